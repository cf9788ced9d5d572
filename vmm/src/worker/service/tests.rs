//! The main thread against a VM that the test plays.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::config::DiskConfig;
use crate::control::ChangeKind;

type Done = Box<dyn FnOnce(Result<VsockStream, ConnectError>) + Send>;
type Plugged = Box<dyn FnOnce(Result<(), String>) + Send>;

/// What the VM is asked about devices.
enum Plug {
    Add(DeviceConfig, Vec<OwnedFd>, Plugged),
    Remove(DeviceId, Plugged),
    Keep(DeviceId),
}

struct FakeMachine {
    plugs: Sender<Plug>,
    end: Arc<(OwnedFd, OnceLock<ExitReason>)>,
    connects: Sender<(u32, Done)>,
}

impl AsFd for FakeMachine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.0.as_fd()
    }
}

impl Machine for FakeMachine {
    const REMOVE_LIMIT: Duration = Duration::from_millis(20);

    fn add(
        &self,
        device: DeviceConfig,
        files: Vec<OwnedFd>,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String> {
        let plug = Plug::Add(device, files, Box::new(done));
        self.plugs.send(plug).unwrap();
        Ok(())
    }

    fn remove(
        &self,
        device: &DeviceId,
        done: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<(), String> {
        if matches!(device, DeviceId::Nic { mac: [2, ..] }) {
            return Err("no such thing".into());
        }
        let plug = Plug::Remove(device.clone(), Box::new(done));
        self.plugs.send(plug).unwrap();
        Ok(())
    }

    fn keep(&self, device: &DeviceId) {
        self.plugs.send(Plug::Keep(device.clone())).unwrap();
    }

    fn end_reason(&self) -> Option<ExitReason> {
        self.end.1.get().cloned()
    }

    fn resize(&self, size: Resize) -> Result<(), String> {
        match size.vcpus {
            Some(1..=4) | None => Ok(()),
            Some(vcpus) => Err(format!("not {vcpus} vCPUs")),
        }
    }

    fn take_changes(&self) -> (Vec<FileChange>, bool) {
        (vec![change()], true)
    }

    fn metrics(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("vcpu_exits_io".to_owned(), 3)])
    }

    fn connect(
        &self,
        port: u32,
        done: impl FnOnce(Result<VsockStream, ConnectError>) + Send + 'static,
    ) {
        self.connects.send((port, Box::new(done))).unwrap();
    }
}

fn change() -> FileChange {
    FileChange {
        kind: ChangeKind::Moved,
        // Names need not be UTF-8.
        path: b".volume-0/\xff".to_vec(),
        to: b".volume-0/b".to_vec(),
        file_type: libc::S_IFREG,
    }
}

/// The shim's side, and the strings by which the test moves the VM.
struct Scene {
    socket: Option<OwnedFd>,
    end: Arc<(OwnedFd, OnceLock<ExitReason>)>,
    connects: Receiver<(u32, Done)>,
    plugs: Receiver<Plug>,
    outlet: Receiver<Outlet<Notice>>,
    worker: JoinHandle<Result<(), WorkerError>>,
}

impl Scene {
    fn open(boots: Result<(), String>) -> Self {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let end = Arc::new((eventfd(0, EventfdFlags::CLOEXEC).unwrap(), OnceLock::new()));
        let (connects, connects_seen) = channel();
        let (plugs, plugs_seen) = channel();
        let (outlet, outlet_seen) = channel();
        let machine = FakeMachine {
            plugs,
            end: Arc::clone(&end),
            connects,
        };
        let worker = std::thread::spawn(move || {
            run(theirs, |_config, _files, notices| {
                boots?;
                outlet.send(notices).unwrap();
                Ok(machine)
            })
        });
        Self {
            socket: Some(ours),
            end,
            connects: connects_seen,
            plugs: plugs_seen,
            outlet: outlet_seen,
            worker,
        }
    }

    /// A scene whose VM runs.
    fn booted() -> (Self, Outlet<Notice>) {
        let scene = Self::open(Ok(()));
        scene.ask(1, boot());
        assert_eq!(scene.hear().0, replied(1, Ok(Reply::Booted)));
        let outlet = scene.outlet.recv().unwrap();
        (scene, outlet)
    }

    fn ask(&self, id: u64, call: Call) {
        self.ask_with(id, call, &[]);
    }

    fn ask_with(&self, id: u64, call: Call, fds: &[BorrowedFd<'_>]) {
        control::send(self.socket.as_ref().unwrap(), &Request { id, call }, fds).unwrap();
    }

    fn hear(&self) -> (Message, Vec<OwnedFd>) {
        control::recv(self.socket.as_ref().unwrap())
            .unwrap()
            .expect("the worker says something")
    }

    fn end(&self, reason: ExitReason) {
        self.end.1.set(reason).unwrap();
        rustix::io::write(&self.end.0, &1_u64.to_ne_bytes()).unwrap();
    }

    fn close(mut self) -> Result<(), WorkerError> {
        drop(self.socket.take());
        self.worker.join().unwrap()
    }
}

fn replied(id: u64, result: Result<Reply, String>) -> Message {
    Message::Reply { id, result }
}

fn boot() -> Call {
    Call::Boot(VmConfig {
        vcpus: 1,
        max_vcpus: 4,
        memory_mib: 64,
        max_memory_mib: 64,
        kernel_params: String::new(),
        shares: Vec::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        file_servers: Vec::new(),
        guest_cid: 3,
        ready_port: 1024,
    })
}

#[test]
fn ends_well_when_the_shim_closes_before_the_boot() {
    Scene::open(Ok(())).close().unwrap();
}

#[test]
fn ends_well_when_the_shim_closes_while_the_vm_runs() {
    let (scene, _outlet) = Scene::booted();
    scene.close().unwrap();
}

#[test]
fn questions_before_the_boot_are_refused() {
    let scene = Scene::open(Ok(()));
    scene.ask(4, Call::Metrics);
    assert_eq!(
        scene.hear().0,
        replied(4, Err("no VM has been booted yet".into()))
    );
    scene.close().unwrap();
}

#[test]
fn second_boot_is_refused() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, boot());
    assert_eq!(
        scene.hear().0,
        replied(2, Err("a VM has been booted already".into()))
    );
    scene.close().unwrap();
}

#[test]
fn failed_boot_is_told_and_ends_the_worker() {
    let scene = Scene::open(Err("no kernel".into()));
    scene.ask(1, boot());
    assert_eq!(scene.hear().0, replied(1, Err("no kernel".into())));
    assert!(matches!(
        scene.worker.join().unwrap(),
        Err(WorkerError::NotBooted(message)) if message == "no kernel"
    ));
}

#[test]
fn metrics_are_answered() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, Call::Metrics);
    let (message, _) = scene.hear();
    let Message::Reply {
        id: 2,
        result: Ok(Reply::Metrics(metrics)),
    } = message
    else {
        panic!("{message:?}");
    };
    assert_eq!(metrics["vcpu_exits_io"], 3);
    scene.close().unwrap();
}

#[test]
fn changes_of_files_are_told_and_taken() {
    let (scene, outlet) = Scene::booted();
    outlet.send(Notice::FilesChanged);
    assert_eq!(scene.hear().0, Message::Event(Event::FilesChanged));
    scene.ask(2, Call::TakeChanges);
    let changes = Reply::Changes {
        changes: vec![change()],
        more: true,
    };
    assert_eq!(scene.hear().0, replied(2, Ok(changes)));
    scene.close().unwrap();
}

#[test]
fn resize_is_answered_by_what_came_of_it() {
    let (scene, _outlet) = Scene::booted();
    let size = |vcpus| {
        Call::Resize(Resize {
            vcpus: Some(vcpus),
            memory_mib: None,
        })
    };
    scene.ask(2, size(4));
    assert_eq!(scene.hear().0, replied(2, Ok(Reply::Resized)));
    scene.ask(3, size(5));
    assert_eq!(scene.hear().0, replied(3, Err("not 5 vCPUs".into())));
    scene.close().unwrap();
}

fn disk() -> DiskConfig {
    DiskConfig {
        serial: "data".into(),
        read_only: false,
    }
}

fn removal() -> Call {
    Call::RemoveDisk {
        serial: "data".into(),
    }
}

#[test]
fn device_is_added_with_its_descriptors_and_delays_nobody() {
    let (scene, _outlet) = Scene::booted();
    let (mut reader, writer) = std::io::pipe().unwrap();
    scene.ask_with(2, Call::AddDisk(disk()), &[writer.as_fd()]);
    drop(writer);
    let Plug::Add(device, files, done) = scene.plugs.recv().unwrap() else {
        panic!("a disk is added");
    };
    assert_eq!((device, files.len()), (DeviceConfig::Disk(disk()), 1));
    scene.ask(3, Call::Metrics);
    assert!(matches!(scene.hear().0, Message::Reply { id: 3, .. }));
    std::thread::spawn(|| done(Ok(())));
    assert_eq!(scene.hear().0, replied(2, Ok(Reply::Added)));
    drop(files);
    // To the end: no copy of the descriptor stays with the worker.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    scene.close().unwrap();
}

#[test]
fn device_that_cannot_be_added_or_removed_is_told() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, Call::AddDisk(disk()));
    let Plug::Add(_, _, done) = scene.plugs.recv().unwrap() else {
        panic!("a disk is added");
    };
    done(Err("full".into()));
    assert_eq!(scene.hear().0, replied(2, Err("full".into())));
    scene.ask(3, Call::RemoveNic { mac: [2; 6] });
    assert_eq!(scene.hear().0, replied(3, Err("no such thing".into())));
    scene.close().unwrap();
}

#[test]
fn removal_is_answered_when_the_guest_has_let_go() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, removal());
    let Plug::Remove(device, done) = scene.plugs.recv().unwrap() else {
        panic!("a disk is removed");
    };
    let serial = "data".to_owned();
    assert_eq!(device, DeviceId::Disk { serial });
    done(Ok(()));
    assert_eq!(scene.hear().0, replied(2, Ok(Reply::Removed)));
    scene.close().unwrap();
}

#[test]
fn removal_that_the_guest_does_not_answer_is_given_up() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, removal());
    scene.ask(3, Call::RemoveNic { mac: [4; 6] });
    let mut asked = Vec::new();
    for _ in 0..2 {
        let Plug::Remove(device, done) = scene.plugs.recv().unwrap() else {
            panic!("two devices are removed");
        };
        asked.push((device, done));
    }
    for (id, (device, done)) in (2..).zip(asked) {
        let Plug::Keep(kept) = scene.plugs.recv().unwrap() else {
            panic!("the removal is given up");
        };
        assert_eq!(kept, device);
        done(Err("too late".into()));
        assert_eq!(scene.hear().0, replied(id, Err("too late".into())));
    }
    scene.close().unwrap();
}

#[test]
fn connect_that_waits_for_the_guest_delays_nobody() {
    let (scene, _outlet) = Scene::booted();
    scene.ask(2, Call::VsockConnect { port: 1025 });
    scene.ask(3, Call::VsockConnect { port: 9 });
    scene.ask(4, Call::Metrics);
    assert!(matches!(scene.hear().0, Message::Reply { id: 4, .. }));

    let (port, first) = scene.connects.recv().unwrap();
    assert_eq!(port, 1025);
    let (_, second) = scene.connects.recv().unwrap();
    // From another thread, as the device does, and out of order.
    std::thread::spawn(|| second(Err(ConnectError::Refused)));
    assert_eq!(
        scene.hear().0,
        replied(3, Err("the guest refused the connection".into()))
    );

    let (mut guest, stream) = UnixStream::pair().unwrap();
    first(Ok(VsockStream {
        local_port: 77,
        stream,
    }));
    let (message, fds) = scene.hear();
    assert_eq!(
        message,
        replied(2, Ok(Reply::VsockConnected { local_port: 77 }))
    );
    let [fd] = <[OwnedFd; 1]>::try_from(fds).unwrap();
    UnixStream::from(fd).write_all(b"hello").unwrap();
    let mut text = String::new();
    // To the end: no copy of the descriptor stays with the worker.
    guest.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    scene.close().unwrap();
}

#[test]
fn ready_is_told() {
    let (scene, outlet) = Scene::booted();
    outlet.send(Notice::Ready);
    assert_eq!(scene.hear().0, Message::Event(Event::Ready));
    scene.close().unwrap();
}

#[test]
fn end_of_the_vm_is_told_last_and_ends_the_worker() {
    let (scene, outlet) = Scene::booted();
    outlet.send(Notice::Ready);
    scene.end(ExitReason::Panic);
    assert_eq!(scene.hear().0, Message::Event(Event::Ready));
    assert_eq!(
        scene.hear().0,
        Message::Event(Event::Exited(ExitReason::Panic))
    );
    scene.worker.join().unwrap().unwrap();
}

#[test]
fn message_that_is_none_ends_the_worker() {
    let (scene, _outlet) = Scene::booted();
    rustix::net::send(
        scene.socket.as_ref().unwrap(),
        b"{}",
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    assert!(matches!(
        scene.worker.join().unwrap(),
        Err(WorkerError::Control(_))
    ));
}
