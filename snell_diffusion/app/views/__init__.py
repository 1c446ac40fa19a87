"""Parts of the page that more than one tab shows."""
