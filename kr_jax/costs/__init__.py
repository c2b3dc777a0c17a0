"""What work costs: FLOPs and bytes of programs, hardware profiles, and energy, money and carbon by them."""
