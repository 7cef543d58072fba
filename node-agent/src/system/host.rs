//! The machine that the agent runs on: a Raspberry Pi, or any other Linux host.
