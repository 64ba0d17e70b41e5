//! The `foretoken` binary: hands the process's arguments and streams to [`server::main_with`].

use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let mut io = server::Io {
        out_is_terminal: stdout.is_terminal(),
        err_is_terminal: stderr.is_terminal(),
        input_is_terminal: stdin.is_terminal(),
        // Not locked for good: threads of a server write here too, if only to say why they panic.
        out: &mut &stdout,
        err: &mut &stderr,
        input: &mut stdin.lock(),
    };
    ExitCode::from(server::main_with(std::env::args_os(), &mut io))
}
