"""The KVM host: memslots, host and nested page tables, get_user_pages ladder, async-PF core, x86 hooks, reclaim, swap map."""
