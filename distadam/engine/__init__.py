"""What happens in backward and in step()."""
