"""A guest vCPU: MMU (jitted walk and TLB), run loop with exits, guest kernel (scheduler, tasks, sleepers), workloads."""
