//! `husk check`: everything that a VM's start depends on, looked at one by one, in the order in which a failure explains
//! those after it.

mod boot;
mod cpu;
mod file_server;
mod guest_files;
mod kvm;
mod report;
mod shim;

use std::path::Path;

use husk_config::{Config, DEFAULT_PATH, Storage};

pub(crate) use report::Report;
use report::{Finding, Problem};

/// Looks at all of it. `config` is the configuration's path, if not the default one.
pub(crate) fn run(config: Option<&Path>) -> Report {
    let configuration = configuration(config);
    let vm = configuration.as_ref().ok().map(|(config, _)| config.vm());

    let mut findings = vec![
        Finding::new("processor", cpu::check()),
        Finding::new("kvm", kvm::check()),
    ];
    let has_kvm = findings.last().is_some_and(Finding::is_ok);
    findings.push(if has_kvm {
        Finding::new("guest", kvm::run_guest())
    } else {
        Finding::skipped("guest", "needs KVM")
    });
    findings.push(match &configuration {
        Ok((_, detail)) => Finding::new("configuration", Ok(detail.clone())),
        Err(problem) => Finding::new("configuration", Err(problem.clone())),
    });
    findings.extend(match vm {
        Some(vm) => [
            Finding::new("kernel", guest_files::check_kernel(vm.kernel())),
            Finding::new("initramfs", guest_files::check_initramfs(vm.initramfs())),
        ],
        None => ["kernel", "initramfs"]
            .map(|subject| Finding::skipped(subject, "the configuration says where it is")),
    });
    let storage = configuration
        .as_ref()
        .ok()
        .map(|(config, _)| config.storage());
    if let Some(server) = storage.and_then(Storage::server) {
        findings.push(Finding::new("file server", file_server::check(server)));
    }
    let shim = shim::check(std::env::var_os("PATH").as_deref());
    findings.push(Finding::new(
        "shim",
        shim.as_ref()
            .map(|(path, version)| format!("{}, version {version}", path.display()))
            .map_err(Clone::clone),
    ));
    let can_boot = findings.iter().all(Finding::is_ok);
    findings.push(match (vm, &shim) {
        (Some(vm), Ok((path, _))) if can_boot => Finding::new("boot", boot::check(vm, path)),
        _ => Finding::skipped("boot", "needs all of the above"),
    });
    Report::new(findings)
}

fn configuration(path: Option<&Path>) -> Result<(Config, String), Problem> {
    let loaded = match path {
        Some(path) => Config::load(path),
        None => Config::load_default(),
    };
    let named = path.unwrap_or(Path::new(DEFAULT_PATH));
    match loaded {
        Ok(config) if named.exists() => Ok((config, named.display().to_string())),
        Ok(config) => Ok((
            config,
            format!("defaults, for there is no {}", named.display()),
        )),
        Err(err) => Err(Problem::from_error(
            &err,
            "The configuration reference in docs/ lists every key and its values.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;

    /// Makes `path` a shell script. By another process: what another test starts meanwhile could inherit a file that is open
    /// for writing, which nobody can run then.
    pub(super) fn write_program(path: &Path, script: &str, mode: u32) {
        let written = Command::new("/bin/sh")
            .args([
                "-c",
                "printf '#!/bin/sh\n%s\n' \"$1\" >\"$2\"",
                "sh",
                script,
            ])
            .arg(path)
            .status();
        assert!(written.unwrap().success());
        set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
}
