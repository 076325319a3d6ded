"""Work with single experts, without knowledge of federation."""
