"""Development tools. The product never imports them."""
