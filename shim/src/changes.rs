//! What others than the guest change in its files: the worker sees it, and the agent tells the guest's kernel, whose
//! inotify would know nothing of it otherwise. A batch is asked for when the one before has been dealt with, so that what
//! waits does so in the worker, which bounds it.

use std::sync::Arc;

use husk_protocol::agent::Change;
use husk_protocol::agent::change::Kind;
use husk_vmm::control::{ChangeKind, FileChange};
use log::{debug, warn};
use tokio::sync::Notify;

use crate::agent::Agent;
use crate::error::Error;
use crate::vm::End;
use crate::vmm::Worker;

/// Passes changes on whenever `changed` says that there are some, until the VM ends.
pub(crate) async fn raise(worker: Worker, agent: Agent, end: End, changed: Arc<Notify>) {
    loop {
        tokio::select! {
            () = changed.notified() => {}
            _ = end.wait() => return,
        }
        let mut more = true;
        while more {
            let taken = match worker.take_changes().await {
                Ok((taken, rest)) => {
                    more = rest;
                    taken
                }
                Err(err) => {
                    debug!("no more changes of files: {}", err.chain());
                    return;
                }
            };
            if taken.is_empty() {
                continue;
            }
            let taken: Vec<_> = taken.into_iter().map(change).collect();
            let count = taken.len();
            match agent.raise_changes(taken).await {
                Ok(()) => debug!("the guest was told of {count} changes of files"),
                Err(Error::VmEnded(_)) => return,
                // What comes later has a chance of its own.
                Err(err) => warn!(
                    "the guest does not know of {count} changes of its files: {}",
                    err.chain()
                ),
            }
        }
    }
}

fn change(change: FileChange) -> Change {
    let kind = match change.kind {
        ChangeKind::Modified => Kind::MODIFIED,
        ChangeKind::Written => Kind::WRITTEN,
        ChangeKind::Attributes => Kind::ATTRIBUTES,
        ChangeKind::Created => Kind::CREATED,
        ChangeKind::Gone => Kind::GONE,
        ChangeKind::Moved => Kind::MOVED,
    };
    Change {
        kind: kind.into(),
        path: change.path,
        to: change.to,
        file_type: change.file_type,
        ..Change::default()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use async_trait::async_trait;
    use containerd_shim::protos::ttrpc::error::get_rpc_status;
    use containerd_shim::protos::ttrpc::{self, Code};
    use husk_protocol::agent::{Empty, RaiseChangesRequest};
    use husk_protocol::agent_ttrpc::{Agent as AgentService, create_agent};
    use husk_vmm::control::{self, Call, Reply, Request};
    use tokio::net::UnixStream;
    use tokio::sync::mpsc;
    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;
    use crate::vmm::tests::{fake_worker, reply};

    /// An agent that cannot raise what it is asked for first.
    struct FakeAgent(mpsc::UnboundedSender<Vec<Change>>);

    #[async_trait]
    impl AgentService for FakeAgent {
        async fn raise_changes(
            &self,
            _: &TtrpcContext,
            req: RaiseChangesRequest,
        ) -> ttrpc::Result<Empty> {
            let is_first = req.changes[0].path == b"first";
            self.0.send(req.changes).unwrap();
            if is_first {
                return Err(get_rpc_status(Code::INTERNAL, "no"));
            }
            Ok(Empty::new())
        }
    }

    fn moved(path: &str) -> FileChange {
        FileChange {
            kind: ChangeKind::Moved,
            path: path.into(),
            to: b"b".to_vec(),
            file_type: 7,
        }
    }

    #[tokio::test]
    async fn changes_are_passed_on_until_none_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (sender, mut raised) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).unwrap())
            .register_service(create_agent(Arc::new(FakeAgent(sender))));
        server.start().await.unwrap();

        let (worker, _events) = fake_worker(|socket| {
            let answers = [
                (vec![moved("first")], true),
                (vec![moved("a"), moved("c")], true),
                (Vec::new(), false),
                (vec![moved("later")], false),
            ];
            for (changes, more) in answers {
                let (request, _) = control::recv::<Request>(&socket).unwrap().unwrap();
                assert_eq!(request.call, Call::TakeChanges);
                let changes = Reply::Changes { changes, more };
                reply(&socket, request.id, Ok(changes), &[]);
            }
        });
        let (end_sender, end) = End::channel();
        let agent = Agent::new(UnixStream::connect(&path).await.unwrap(), end.clone());
        let changed = Arc::new(Notify::new());
        // Before anybody listens, as while the VM boots.
        changed.notify_one();
        let task = tokio::spawn(raise(worker, agent, end, changed.clone()));
        let paths = |changes: Vec<Change>| -> Vec<_> {
            assert!(changes.iter().all(|change| {
                change.kind == Kind::MOVED.into() && change.to == b"b" && change.file_type == 7
            }));
            changes.into_iter().map(|change| change.path).collect()
        };
        assert_eq!(paths(raised.recv().await.unwrap()), [b"first"]);
        assert_eq!(paths(raised.recv().await.unwrap()), [b"a", b"c"]);
        changed.notify_one();
        assert_eq!(paths(raised.recv().await.unwrap()), [b"later"]);
        end_sender.send_replace(Some(Arc::from("done")));
        task.await.unwrap();
    }
}
