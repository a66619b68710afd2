"""What people type: the boxship command."""
