//! Records seeds of the fuzz targets: what Linux's own clients ask for while programs use files.
//!
//!     record fuse|p9 SESSIONS FOLDER
//!
//! runs each of the sessions of the program SESSIONS (which lists them, and runs one: see vmm/fuzz/sessions.py) on a mount of
//! its own, serves the mount as the worker does, and leaves what was asked for in FOLDER, by the session's name. It has to be
//! root, and the kernel needs a FUSE client, or one of 9P by descriptors.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use fuse_backend_rs::abi::fuse_abi::InHeader;
use husk_vmm_fuzz::{MAX_RECORDS, fuse, p9};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tempfile::TempDir;
use vm_memory::ByteValued;

/// The longest request, of 1 MiB, and more.
const MAX_REQUEST: usize = (1 << 20) + 8192;

/// Longest input that ci/fuzz makes.
const MAX_INPUT: usize = 4096;

/// One of the two that play a guest.
trait Guest: Send + 'static {
    /// The host changes something. Returns the record of it.
    fn change(&mut self, what: u8) -> io::Result<Vec<u8>>;
    /// Looks what has become of the host.
    fn end(self);
}

impl Guest for fuse::Guest {
    fn change(&mut self, what: u8) -> io::Result<Vec<u8>> {
        self.change(what)
    }

    fn end(self) {
        self.end();
    }
}

impl Guest for p9::Guest {
    fn change(&mut self, _what: u8) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn end(self) {
        self.end();
    }
}

/// What is being recorded.
struct Recording<G> {
    guest: G,
    input: Vec<u8>,
    records: usize,
    /// What an input has no room for.
    left_out: usize,
}

impl<G> Recording<G> {
    fn add(&mut self, record: &[u8]) {
        let fits = self.input.len() + record.len() <= MAX_INPUT && self.records < MAX_RECORDS;
        // Without what comes before it, a request is another.
        if fits && self.left_out == 0 {
            self.input.extend(record);
            self.records += 1;
        } else {
            self.left_out += 1;
        }
    }
}

type Shared<G> = Arc<Mutex<Recording<G>>>;

fn lock<G>(shared: &Shared<G>) -> MutexGuard<'_, Recording<G>> {
    shared.lock().expect("nobody panicked")
}

/// A client's mount, and the thread that serves it.
struct Mounted {
    at: TempDir,
    server: JoinHandle<io::Result<()>>,
}

fn mount_at(at: &Path, kind: &str, options: String) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let options = std::ffi::CString::new(options)?;
    Ok(mount("husk", at, kind, flags, options.as_c_str())?)
}

fn mount_fuse(shared: Shared<fuse::Guest>) -> io::Result<Mounted> {
    let at = TempDir::new()?;
    let client = File::options().read(true).write(true).open("/dev/fuse")?;
    // As virtio-fs has it.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        client.as_raw_fd()
    );
    mount_at(at.path(), "fuse", options)?;
    let server = thread::spawn(move || serve_fuse(client, &shared));
    Ok(Mounted { at, server })
}

fn serve_fuse(mut client: File, shared: &Shared<fuse::Guest>) -> io::Result<()> {
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        let len = match client.read(&mut buffer) {
            Ok(len) => len,
            // It is unmounted.
            Err(err) if err.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            // Whoever asked has been killed, as below.
            Err(err) if err.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(err) => return Err(err),
        };
        let (header, body) = buffer[..len].split_at(size_of::<InHeader>());
        let mut request = InHeader::default();
        request.as_mut_slice().copy_from_slice(header);
        let mut recording = lock(shared);
        let (answer, records) = recording.guest.pass_on(request, body);
        for record in records {
            recording.add(&record);
        }
        drop(recording);
        if !answer.is_empty() {
            match client.write_all(&answer) {
                Err(err) if err.raw_os_error() != Some(libc::ENOENT) => return Err(err),
                _ => {}
            }
        }
    }
}

fn mount_p9(shared: Shared<p9::Guest>) -> io::Result<Mounted> {
    let at = TempDir::new()?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let server = thread::spawn(move || serve_p9(ours, &shared));
    // As husk's guests have it by default, but for the transport and the length of messages.
    let options = format!(
        "trans=fd,rfdno={0},wfdno={0},version=9p2000.L,access=client,posixacl,cache=mmap,msize={1}",
        theirs.as_raw_fd(),
        p9::MSIZE
    );
    mount_at(at.path(), "9p", options)?;
    Ok(Mounted { at, server })
}

fn serve_p9(client: OwnedFd, shared: &Shared<p9::Guest>) -> io::Result<()> {
    let mut client = File::from(client);
    loop {
        let mut header = [0; p9::HEADER_LEN];
        match client.read_exact(&mut header) {
            Ok(()) => {}
            // It is unmounted.
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(err) => return Err(err),
        }
        let [a, b, c, d, kind, e, f] = header;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        let mut body = vec![0; len - p9::HEADER_LEN];
        client.read_exact(&mut body)?;
        let mut recording = lock(shared);
        let tag = u16::from_le_bytes([e, f]);
        let (answer, record) = recording.guest.pass_on(kind, tag, &body);
        if let Some(record) = record {
            recording.add(&record);
        }
        drop(recording);
        client.write_all(&answer)?;
    }
}

/// Runs a session and returns what it asked for.
fn record<G: Guest>(
    guest: G,
    client: impl FnOnce(Shared<G>) -> io::Result<Mounted>,
    sessions: &Path,
    name: &str,
) -> io::Result<Vec<u8>> {
    let shared = Arc::new(Mutex::new(Recording {
        guest,
        input: Vec::new(),
        records: 0,
        left_out: 0,
    }));
    let Mounted { at, server } = client(Arc::clone(&shared))?;
    let mut session = Command::new(sessions)
        .arg(name)
        .arg(at.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (asked, answers) = (session.stdout.take(), session.stdin.take());
    let (asked, mut answers) = (asked.expect("a pipe"), answers.expect("a pipe"));
    // Each byte is a change of the host's that it wants.
    for what in BufReader::new(asked).bytes() {
        let mut recording = lock(&shared);
        let change = recording.guest.change(what?)?;
        recording.add(&change);
        drop(recording);
        answers.write_all(&[0])?;
    }
    let status = session.wait()?;
    unmount(at.path(), UnmountFlags::empty())?;
    server.join().expect("the server does not panic")?;
    if !status.success() {
        return Err(io::Error::other(format!("session {name}: {status}")));
    }
    let recording = Arc::into_inner(shared).expect("the thread is gone");
    let Recording {
        guest,
        input,
        records,
        left_out,
    } = recording.into_inner().expect("nobody panicked");
    guest.end();
    println!(
        "{name}: {records} records, {} bytes; {left_out} left out",
        input.len()
    );
    Ok(input)
}

fn main() -> io::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [protocol, sessions, folder] = arguments.as_slice() else {
        return Err(io::Error::other("usage: record fuse|p9 SESSIONS FOLDER"));
    };
    let (sessions, folder) = (PathBuf::from(sessions), PathBuf::from(folder));
    let listed = Command::new(&sessions).arg(protocol).output()?.stdout;
    for name in String::from_utf8_lossy(&listed).lines() {
        let input = if protocol == "fuse" {
            record(fuse::Guest::new(), mount_fuse, &sessions, name)?
        } else {
            record(p9::Guest::new(), mount_p9, &sessions, name)?
        };
        std::fs::write(folder.join(name), input)?;
    }
    Ok(())
}
