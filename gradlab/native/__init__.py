"""Programs in C++ that are compiled on the machine that runs them, at their first use; nothing happens at import."""
