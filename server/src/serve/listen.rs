//! Connections: how many are open at once, and how long one may keep the server waiting.
//!
//! Input: the socket, and the router behind all checks. A connection whose next request does not
//! come in time is closed, also in the middle of a request's head; an answer may take as long as it
//! likes. Not here: bodies ([`super::extract`]), what requests may ask ([`super::access`]).

use crate::cli::AccessArgs;
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

/// After this, an address that could not take a connection may do so again: some were closed.
const PAUSE: Duration = Duration::from_millis(100);

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most of them at once, at least 1; more wait until one is closed.
    pub connections: usize,
    /// Longest time to a connection's first request, and from an answer to the head of the next.
    pub idle: Duration,
}

impl Limits {
    /// What was typed.
    pub(crate) fn new(args: &AccessArgs) -> Self {
        let idle = Duration::from_secs(args.idle_seconds);
        Self { connections: args.max_connections as usize, idle }
    }
}

/// Answers until `stop` comes, then takes no more connections, and returns when the open ones have
/// got their last answers.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: impl Future<Output = ()>,
) {
    let (places, open) = (Arc::new(Semaphore::new(limits.connections)), GracefulShutdown::new());
    let (builder, mut stop) = (builder(limits.idle), pin!(stop));
    loop {
        let (stream, place) = tokio::select! {
            () = &mut stop => break,
            next = next(&listener, &places) => next,
        };
        let asked = Arc::new(AtomicBool::new(false));
        let note = asked.clone();
        let service = router.clone().map_request(move |request: axum::http::Request<_>| {
            note.store(true, Ordering::Relaxed);
            request
        });
        let service = TowerToHyperService::new(service);
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let connection = open.watch(connection);
        tokio::spawn(async move {
            tokio::select! {
                // What goes wrong on a connection ends that one alone.
                _ = connection => {}
                () = silent(asked, limits.idle) => {}
            }
            drop(place);
        });
    }
    drop(listener);
    open.shutdown().await;
}

/// Both versions of HTTP, told apart by a connection's first bytes.
fn builder(idle: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(idle);
    builder
}

/// The next connection, when there is a place for it.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // There are always places to wait for: nobody closes them.
    let place = places.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are small and must not wait for each other; a slower stream is still one.
                let _ = stream.set_nodelay(true);
                return (stream, place);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset
                ) => {}
            // Too many open files, most likely.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Comes if there was no request in time. (Later ones are the business of the version of HTTP,
/// which is not known before the first.)
async fn silent(asked: Arc<AtomicBool>, idle: Duration) {
    tokio::time::sleep(idle).await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use std::io::{Read, Write};
    use std::net::SocketAddr;
    use std::time::Instant;
    use tokio::runtime::Runtime;
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    const IDLE: Duration = Duration::from_millis(600);
    /// Longer than anything here takes, but for what never comes.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Server {
        runtime: Runtime,
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        over: JoinHandle<()>,
    }

    impl Server {
        fn start(connections: usize) -> Self {
            let slow = async || {
                tokio::time::sleep(2 * IDLE).await;
                "slow"
            };
            let router = Router::new().route("/", get(async || "here")).route("/slow", get(slow));
            let runtime = Runtime::new().unwrap();
            let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
            let address = listener.local_addr().unwrap();
            let (stop, stopped) = oneshot::channel();
            let limits = Limits { connections, idle: IDLE };
            let stopped = async { stopped.await.unwrap() };
            let over = runtime.spawn(serve(listener, router, limits, stopped));
            Self { runtime, address, stop, over }
        }

        fn connect(&self, text: &str) -> std::net::TcpStream {
            let mut stream = std::net::TcpStream::connect(self.address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            stream
        }

        /// Asks, and lets the server close the connection.
        fn ask(&self, path: &str) -> String {
            rest(self.connect(&format!("GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n")))
        }
    }

    /// All that comes until the server closes the connection.
    fn rest(mut stream: std::net::TcpStream) -> String {
        let mut text = vec![];
        // A connection that is closed while bytes of it were not read is reset.
        let end = stream.read_to_end(&mut text);
        assert!(end.map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |_| true));
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn who_does_not_ask_in_time_is_closed_and_the_others_are_answered() {
        let server = Server::start(100);
        let start = Instant::now();
        let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let slow = ["GET / HTTP/1.1\r\nhost: a\r\nx-half", "", "G", &preface[..20], preface];
        let slow = slow.map(|text| server.connect(text));
        assert!(server.ask("/").ends_with("here"));
        assert!(start.elapsed() < IDLE, "nobody waits for the slow ones");
        for (i, stream) in slow.into_iter().enumerate() {
            assert!(!rest(stream).contains("here"), "{i}");
        }
        assert!(start.elapsed() >= IDLE);
        assert!(start.elapsed() < PATIENCE / 2);
        assert!(server.ask("/slow").ends_with("slow"), "an answer may take longer");
    }

    #[test]
    fn a_connection_that_asks_now_and_then_stays() {
        let server = Server::start(100);
        let mut stream = server.connect("");
        for _ in 0..5 {
            std::thread::sleep(IDLE / 3);
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
            let mut text = vec![];
            while !text.ends_with(b"here") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                text.push(byte[0]);
            }
        }
        // Half of a later head.
        stream.write_all(b"GET / HT").unwrap();
        assert_eq!(rest(stream), "");
    }

    #[test]
    fn more_connections_than_places_wait() {
        let server = Server::start(2);
        let full = [server.connect("GET /"), server.connect("GET /")];
        let start = Instant::now();
        let [first, _second] = full;
        let third = server.connect("GET / HTTP/1.1\r\nconnection: close\r\n\r\n");
        third.set_read_timeout(Some(IDLE / 3)).unwrap();
        let early = (&third).read(&mut [0]);
        assert!(early.is_err(), "there was a place: {early:?}");
        drop(first);
        third.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(rest(third).ends_with("here"));
        assert!(start.elapsed() < PATIENCE / 2);
    }

    #[test]
    fn open_answers_end_and_nothing_new_begins_after_the_stop() {
        let server = Server::start(100);
        let mut idle = server.connect("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        idle.read_exact(&mut [0; 20]).unwrap();
        let slow = server.connect("GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
        std::thread::sleep(IDLE / 3);
        let Server { runtime, address, stop, over } = server;
        stop.send(()).unwrap();
        assert!(rest(idle).ends_with("here"), "an idle one is closed");
        assert!(rest(slow).ends_with("slow"), "an open answer ends");
        runtime.block_on(over).unwrap();
        assert!(std::net::TcpStream::connect(address).is_err());
    }
}
