//! The three streams of a command, so that tests can hold the other end.

use std::io::{Read, Write};

/// Where a command reads and writes.
#[allow(missing_debug_implementations, reason = "streams have nothing to print")]
pub struct Io<'a> {
    /// Results.
    pub out: &'a mut dyn Write,
    /// Errors, speeds and progress.
    pub err: &'a mut dyn Write,
    /// A prompt, where none is given as an argument.
    pub input: &'a mut dyn Read,
    /// Whether a person reads `out` at a terminal, which can show colours.
    pub out_is_terminal: bool,
    /// Whether a person reads `err` at a terminal: progress bars and speeds are shown then.
    pub err_is_terminal: bool,
    /// Whether `input` is a terminal, where waiting for a prompt would look like hanging.
    pub input_is_terminal: bool,
}

/// Whether the reader of our output went away (`foretoken run | head`), which is no error.
pub(crate) fn is_closed_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
