"""Sits at a terminal: CONVERSATION PROGRAM ARGUMENT...; the conversation is a list in JSON of what is waited for, and what
is typed then. Prints all that the terminal shows, and ends as the program does."""

import json
import os
import pty
import select
import sys

conversation, program = json.loads(sys.argv[1]), sys.argv[2:]
child, terminal = pty.fork()
if child == 0:
    os.execv(program[0], program)
shown = ""
seen = 0
while True:
    if not select.select([terminal], [], [], 50)[0]:
        sys.exit(f"nothing more is shown after: {shown}")
    try:
        some = os.read(terminal, 4096)
    except OSError:
        some = b""
    if not some:
        break
    shown += some.decode()
    if conversation and conversation[0][0] in shown[seen:]:
        seen = len(shown)
        os.write(terminal, conversation.pop(0)[1].encode() + b"\n")
_, status = os.waitpid(child, 0)
print(shown)
sys.exit(f"this was never asked: {conversation}" if conversation else os.waitstatus_to_exitcode(status))
