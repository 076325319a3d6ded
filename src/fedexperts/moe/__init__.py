"""What is known about experts, and nothing about federation."""
