"""The allocator in other trainers, to be copied and changed; they import those trainers, and nothing imports them."""
