"""Ring 0: domains, traps, hypercalls, frames and page tables, schedulers."""
