"""What decisions are carried out on, one target a file."""
