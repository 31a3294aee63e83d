"""The prefix cache inside other libraries; each subpackage needs an extra of its own."""
