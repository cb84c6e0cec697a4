"""What the model does inside: gates, and plots of them."""
