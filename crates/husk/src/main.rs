//! The husk command-line tool: what an administrator of a node asks.

mod check;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs containers in virtual machines: the tool beside the containerd shim.
#[derive(Debug, Parser)]
#[command(name = "husk", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether this machine can run Husk's virtual machines, and for each thing that is wrong what to do.
    ///
    /// The exit code is 0 only if a virtual machine would start.
    Check {
        /// The configuration, instead of /etc/husk/husk.toml.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Check { config } => {
            let report = check::run(config.as_deref());
            report.print(&mut std::io::stdout().lock())?;
            Ok(if report.is_fit() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
