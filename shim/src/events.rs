//! Events for containerd, in the order in which they happened.
//!
//! [`Events::publish`] never waits: a task of its own forwards one event after the other to containerd's ttrpc socket.
//! containerd may be restarted meanwhile; then an event is tried again over a new connection, and the ones behind it
//! wait. [`Events::flush`] is for the end of the shim.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::protos::api::ForwardRequest;
use containerd_shim::protos::protobuf::MessageDyn;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc;
use containerd_shim::util::{convert_to_any, timestamp};
use log::{debug, warn};
use tokio::sync::{mpsc, oneshot};

/// How often an event is tried before it is dropped; as runc's shim does.
const MAX_TRIES: u32 = 5;

/// Pause before the second and later tries, times their number. containerd announces its return to nobody.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How long containerd may take to accept one event.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// The queue of events of one shim. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    namespace: Arc<str>,
    queue: mpsc::UnboundedSender<Item>,
}

#[derive(Debug)]
enum Item {
    Event(Envelope),
    /// Answered when everything before it is done with.
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// Forwards events of `namespace` to containerd's ttrpc server at `address`, a path with or without `unix://`.
    pub(crate) fn new(address: &str, namespace: &str) -> Self {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let forwarder = Forwarder {
            address: format!("unix://{path}"),
            client: None,
        };
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forwarder.run(receiver));
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Queues `event`.
    pub(crate) fn publish(&self, event: impl Event) {
        let topic = event.topic();
        match self.envelope(&topic, Box::new(event)) {
            Ok(envelope) => self.push(Item::Event(envelope)),
            Err(err) => warn!("event {topic} cannot be encoded: {err}"),
        }
    }

    /// Waits until every event published so far is delivered or given up, but no longer than `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        self.push(Item::Flush(done));
        if tokio::time::timeout(limit, flushed).await.is_err() {
            warn!("containerd did not take all events");
        }
    }

    fn envelope(
        &self,
        topic: &str,
        event: Box<dyn MessageDyn>,
    ) -> containerd_shim::Result<Envelope> {
        Ok(Envelope {
            timestamp: Some(timestamp()?).into(),
            namespace: self.namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(convert_to_any(event)?).into(),
            ..Envelope::default()
        })
    }

    fn push(&self, item: Item) {
        // The forwarder lives as long as there is a sender.
        let _ = self.queue.send(item);
    }
}

struct Forwarder {
    address: String,
    client: Option<EventsClient>,
}

impl Forwarder {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Item>) {
        while let Some(item) = queue.recv().await {
            match item {
                Item::Event(envelope) => self.deliver(envelope).await,
                Item::Flush(done) => drop(done.send(())),
            }
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..ForwardRequest::default()
        };
        for attempt in 1..=MAX_TRIES {
            match self.forward(&request).await {
                Ok(()) => {
                    debug!("published {topic}");
                    return;
                }
                // containerd has it and does not want it.
                Err(ttrpc::Error::RpcStatus(status)) => {
                    warn!("containerd refuses event {topic}: {}", status.message());
                    return;
                }
                Err(err) if attempt == MAX_TRIES => warn!("event {topic} is lost: {err}"),
                Err(_) => {
                    self.client = None;
                    // An old connection may have broken unnoticed: the second try comes at once.
                    tokio::time::sleep(RETRY_PAUSE * (attempt - 1)).await;
                }
            }
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&self.address).await?),
        };
        let context = ttrpc::context::with_duration(FORWARD_LIMIT);
        let result = client.forward(context, request).await;
        self.client = Some(client);
        result.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use async_trait::async_trait;
    use containerd_shim::protos::api::Empty;
    use containerd_shim::protos::events::task::{TaskExit, TaskStart};
    use containerd_shim::protos::shim_async::{Events as EventsService, create_events};
    use ttrpc::r#async::transport::Listener;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl EventsService for Containerd {
        async fn forward(&self, _: &TtrpcContext, req: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(req.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(path: &std::path::Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).unwrap())
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    #[tokio::test]
    async fn events_arrive_in_order_with_topic_and_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (_server, mut received) = serve(&path).await;
        let events = Events::new(path.to_str().unwrap(), "k8s.io");
        for pid in 0..20 {
            events.publish(TaskStart {
                pid,
                ..TaskStart::default()
            });
        }
        events.publish(TaskExit::default());
        events.flush(Duration::from_secs(10)).await;
        for pid in 0..20 {
            let envelope = received.try_recv().unwrap();
            assert_eq!(envelope.topic, "/tasks/start");
            assert_eq!(envelope.namespace, "k8s.io");
            assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");
            let event = <TaskStart as containerd_shim::protos::protobuf::Message>::parse_from_bytes(
                &envelope.event.value,
            );
            assert_eq!(event.unwrap().pid, pid);
        }
        assert_eq!(received.try_recv().unwrap().topic, "/tasks/exit");
    }

    #[tokio::test]
    async fn containerd_may_be_restarted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (mut server, _first) = serve(&path).await;
        let events = Events::new(path.to_str().unwrap(), "default");
        events.publish(TaskStart::default());
        events.flush(Duration::from_secs(10)).await;
        server.shutdown().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_server, mut second) = serve(&path).await;
        events.publish(TaskExit::default());
        events.flush(Duration::from_secs(10)).await;
        assert_eq!(second.try_recv().unwrap().topic, "/tasks/exit");
    }
}
