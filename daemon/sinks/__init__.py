"""Where verdicts and pictures go. A sink delivers what the outbox holds, and says when it has arrived."""
