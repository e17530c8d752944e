"""Reports as pages: what stands on one, and how it becomes HTML or Markdown."""
