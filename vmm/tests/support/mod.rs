//! Guests for tests on real KVM: the project's kernel, and an initramfs that the test writes around a static busybox.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends where something of its own fails"
)]
#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test program uses a part of it, so `expect` would fail in those that use all"
)]

mod cpio;
pub(crate) mod net;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use husk_vmm::config::VmConfig;
use husk_vmm::control::ExitReason;
use husk_vmm::{Confinement, Error, NicFiles, RestoreFiles, VmFiles, VmState, Vmm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// More than any of these guests needs, under emulation and beside other work.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// What a guest is made of.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) config: VmConfig,
    pub(crate) kernel: PathBuf,
    /// The shell script that runs as /init.
    pub(crate) init: String,
    pub(crate) disks: Vec<File>,
    pub(crate) nics: Vec<NicFiles>,
    pub(crate) file_servers: Vec<OwnedFd>,
}

impl Guest {
    /// One vCPU, 256 MiB, the ELF kernel, and `init` as the script of the first process.
    pub(crate) fn new(init: &str) -> Self {
        Self {
            config: VmConfig {
                vcpus: 1,
                max_vcpus: 1,
                memory_mib: 256,
                max_memory_mib: 256,
                kernel_params: String::new(),
                shares: Vec::new(),
                disks: Vec::new(),
                nics: Vec::new(),
                file_servers: Vec::new(),
                guest_cid: 3,
                ready_port: 1024,
            },
            kernel: kernel(),
            init: init.to_owned(),
            disks: Vec::new(),
            nics: Vec::new(),
            file_servers: Vec::new(),
        }
    }

    /// Builds and starts it.
    pub(crate) fn start(self) -> Running {
        let initramfs = initramfs(&self.init);
        self.start_with(initramfs)
    }

    /// Builds and starts it with another initramfs.
    pub(crate) fn start_with(self, initramfs: File) -> Running {
        let (console, output) = Console::new();
        let files = VmFiles {
            kernel: File::open(&self.kernel).unwrap_or_else(|err| {
                panic!("{}: {err}; build it with ci/guest", self.kernel.display())
            }),
            initramfs,
            console: output,
            disks: self.disks,
            nics: self.nics,
            file_servers: self.file_servers,
        };
        let begin = Instant::now();
        let vmm = Vmm::new(&self.config, files, || (), Confinement::NONE).unwrap();
        println!("built in {:?}", begin.elapsed());
        vmm.start().unwrap();
        Running {
            vmm,
            console,
            begin,
        }
    }
}

/// What is kept of a VM, for another to be made of it.
#[derive(Debug)]
pub(crate) struct Saved {
    state: String,
    memory: File,
}

impl Saved {
    /// Pauses a guest and saves it.
    pub(crate) fn of(vmm: &Vmm) -> Self {
        vmm.pause().unwrap();
        let state = serde_json::to_string(&vmm.save().unwrap()).unwrap();
        println!("the state has {} bytes", state.len());
        let memory = tempfile::tempfile().unwrap();
        vmm.save_memory(&memory).unwrap();
        Self { state, memory }
    }

    pub(crate) fn state(&self) -> VmState {
        serde_json::from_str(&self.state).unwrap()
    }

    /// Makes a VM of it, with these files for the devices that came while the guest ran, and lets it go on.
    pub(crate) fn restore(&self, config: &VmConfig, added: Vec<OwnedFd>) -> Result<Running, Error> {
        let (console, output) = Console::new();
        let files = RestoreFiles {
            memory: self.memory.try_clone().unwrap(),
            console: output,
            disks: Vec::new(),
            nics: Vec::new(),
            added,
        };
        let vmm = Vmm::restore(config, files, self.state(), Confinement::NONE)?;
        vmm.start().unwrap();
        Ok(Running {
            vmm,
            console,
            begin: Instant::now(),
        })
    }
}

/// A guest that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) vmm: Vmm,
    pub(crate) console: Console,
    begin: Instant,
}

impl Running {
    /// Waits for the end of the VM; returns the reason and all that the console said.
    #[track_caller]
    pub(crate) fn end(self) -> (ExitReason, String) {
        let mut fds = [PollFd::new(&self.vmm, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: PATIENCE.as_secs().try_into().unwrap(),
            tv_nsec: 0,
        };
        let ready = poll(&mut fds, Some(&patience)).unwrap();
        let reason = self.vmm.exit_reason();
        println!("ended after {:?}: {reason:?}", self.begin.elapsed());
        println!("{:#?}", self.vmm.metrics());
        drop(self.vmm);
        let output = self.console.finish();
        assert_eq!(ready, 1, "the guest did not end; its console:\n{output}");
        (
            reason.expect("the event is announced with its reason"),
            output,
        )
    }
}

/// What the guest writes to its console.
#[derive(Debug)]
pub(crate) struct Console {
    seen: Arc<(Mutex<String>, Condvar)>,
    reader: JoinHandle<()>,
}

impl Console {
    /// A console, and where the VM writes to.
    pub(crate) fn new() -> (Self, File) {
        let (reader, writer) = std::io::pipe().unwrap();
        let console = Self::follow(File::from(OwnedFd::from(reader)));
        (console, File::from(OwnedFd::from(writer)))
    }

    fn follow(mut pipe: File) -> Self {
        let seen = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let shared = Arc::clone(&seen);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                // The guest's terminal layer ends lines as a terminal wants them.
                let text = String::from_utf8_lossy(&buffer[..count]).replace('\r', "");
                shared.0.lock().unwrap().push_str(&text);
                shared.1.notify_all();
            }
        });
        Self { seen, reader }
    }

    /// Waits until the console has said `text`.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        let seen = self.seen.0.lock().unwrap();
        let (seen, timeout) = self
            .seen
            .1
            .wait_timeout_while(seen, PATIENCE, |seen| !seen.contains(text))
            .unwrap();
        assert!(!timeout.timed_out(), "no {text:?} in:\n{seen}");
    }

    /// All that was said, once the VM is gone.
    fn finish(self) -> String {
        self.reader.join().unwrap();
        self.seen.0.lock().unwrap().clone()
    }
}

/// The project's kernel as ELF.
pub(crate) fn kernel() -> PathBuf {
    built("HUSK_TEST_KERNEL", "vmlinux")
}

/// The project's kernel as bzImage.
pub(crate) fn bzimage() -> PathBuf {
    built("HUSK_TEST_BZIMAGE", "bzImage")
}

fn built(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(
        || {
            PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join("../target/guest")
                .join(name)
        },
        PathBuf::from,
    )
}

/// An initramfs with busybox and `script` as /init.
pub(crate) fn initramfs(script: &str) -> File {
    initramfs_with(script, &[])
}

/// The same, with further programs.
pub(crate) fn initramfs_with(script: &str, programs: &[(&str, &[u8])]) -> File {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let prelude = "#!/bin/busybox sh\n\
        export PATH=/bin\n\
        /bin/busybox mount -t proc proc /proc\n\
        /bin/busybox --install -s /bin\n\
        mount -t sysfs sys /sys\n\
        mount -t devtmpfs dev /dev\n";
    let mut archive = cpio::Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "mnt"] {
        archive.folder(folder);
    }
    archive.console("dev/console");
    archive.program("bin/busybox", &busybox);
    for (path, content) in programs {
        archive.program(path, content);
    }
    archive.program("init", format!("{prelude}{script}").as_bytes());
    file_of(&archive.finish())
}

/// A program in C for a guest, which has no libraries.
pub(crate) fn compile(source: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (
        folder.path().join("program.c"),
        folder.path().join("program"),
    );
    std::fs::write(&input, source).unwrap();
    let status = Command::new("cc")
        .args(["-static", "-O1", "-Wall", "-Werror", "-o"])
        .args([&output, &input])
        .status()
        .expect("there is a compiler of C");
    assert!(status.success(), "the program does not compile");
    std::fs::read(output).unwrap()
}

/// A script for /init that runs `script` for each event of the guest's kernel, with what the event says in its environment,
/// and says `HUSK is up` once events arrive.
pub(crate) fn on_uevent(script: &str) -> String {
    format!(
        "cat > /bin/on-uevent <<'END'\n#!/bin/sh\n\
         [ $DEVPATH != /devices/virtual/mem/null ] || exec touch /listens\n{script}END\n\
         chmod +x /bin/on-uevent\n\
         uevent /bin/on-uevent &\n\
         until [ -e /listens ]; do echo change > /sys/devices/virtual/mem/null/uevent; sleep 0.1; done\n\
         echo HUSK is up; wait\n"
    )
}

/// An open file with this content.
pub(crate) fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// An error and its sources.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Whether guests can run here. Says aloud why not; where they must (in the node, `HUSK_TEST_KVM=1`), fails instead.
pub(crate) fn has_kvm() -> bool {
    match husk_vmm::probe() {
        Ok(()) => true,
        Err(err) => {
            let reason = chain(&err);
            assert!(
                std::env::var_os("HUSK_TEST_KVM").is_none(),
                "HUSK_TEST_KVM is set, but {reason}"
            );
            say_skipped(&reason);
            false
        }
    }
}

/// Says why a test does nothing: not by eprintln!, whose output is only shown for a test that fails.
pub(crate) fn say_skipped(reason: &str) {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
}

/// Ends the test here where no guest can run.
macro_rules! require_kvm {
    () => {
        if !$crate::support::has_kvm() {
            return;
        }
    };
}
pub(crate) use require_kvm;
