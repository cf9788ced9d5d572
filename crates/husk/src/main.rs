//! The husk command-line tool: what an administrator of a node asks.

mod check;
mod node;
mod volume;

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
    /// Puts Husk on a node: programs, the guest's files, and the runtime handler in containerd's configuration.
    ///
    /// What is there already is left alone. containerd has to be restarted if its configuration has changed, which is
    /// said.
    Install {
        /// The folder with the files: containerd-shim-husk-v2, husk, vmlinux and initramfs.cpio.
        #[arg(long, value_name = "FOLDER")]
        from: PathBuf,
        /// Where the node's file system is, if not at /.
        #[arg(long, value_name = "FOLDER", default_value = "/")]
        root: PathBuf,
    },
    /// Takes away what `install` has put there. Drain the node before.
    Uninstall {
        /// Where the node's file system is, if not at /.
        #[arg(long, value_name = "FOLDER", default_value = "/")]
        root: PathBuf,
    },
    /// Leaves the disk of a volume to the guests.
    #[command(subcommand)]
    Volume(volume::Command),
}

fn main() -> anyhow::Result<ExitCode> {
    let out = &mut std::io::stdout().lock();
    match Cli::parse().command {
        Command::Check { config } => {
            let report = check::run(config.as_deref());
            report.print(out)?;
            if !report.is_fit() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Install { from, root } => node::install(&from, &root, out)?,
        Command::Uninstall { root } => node::uninstall(&root, out)?,
        Command::Volume(command) => volume::run(command)?,
    }
    Ok(ExitCode::SUCCESS)
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
