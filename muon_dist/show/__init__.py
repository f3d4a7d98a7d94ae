"""What people look at: tables, pictures, a run as it goes, and its page."""
