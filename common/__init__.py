"""What every room may use: errors, files, images, plotting."""
