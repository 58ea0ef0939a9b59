//! The status page of the daemon: `GET /live`, `/ready`, `/status`, `/metrics`, on a thread of its own. It reads
//! snapshots and changes nothing. It asks nobody who they are, so it listens on loopback unless told otherwise.

mod metrics;

use std::{
    net::{SocketAddr, TcpListener},
    thread::{self, JoinHandle},
    time::Duration,
};

use actix_web::{
    App, HttpResponse, HttpServer,
    dev::ServerHandle,
    http::header::ContentType,
    web::{self, Data},
};
use tracing::{info, warn};

use crate::{config::Http, error::Error, runtime::Watcher};

/// How long an idle connection is kept for the next request.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long a client may take to close its side.
const DISCONNECT: Duration = Duration::from_secs(1);
/// What Prometheus calls its text format.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A running status page; it ends when it is dropped.
pub(crate) struct StatusPage {
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
}

/// Takes the port, so that one that is taken is told before a node starts.
pub(crate) fn bind(config: &Http) -> Result<TcpListener, Error> {
    TcpListener::bind(config.listen).map_err(system(format!("http.listen: cannot listen on {}", config.listen)))
}

/// Serves until the page is dropped.
pub(crate) fn serve(listener: TcpListener, config: &Http, watcher: Watcher) -> Result<StatusPage, Error> {
    let address = listener.local_addr().map_err(system("http.listen: no address".to_owned()))?;
    let (report, started) = crossbeam_channel::bounded(1);
    let config = config.clone();
    let run = move || {
        actix_rt::System::new().block_on(async move {
            match server(listener, &config, watcher) {
                Ok(server) => {
                    // Whoever started the page waits for this.
                    let _starter_left = report.send(Ok(server.handle()));
                    if let Err(error) = server.await {
                        warn!(%error, "the status page ended");
                    }
                }
                Err(error) => _ = report.send(Err(error)),
            }
        });
    };
    let thread = thread::Builder::new().name("skep-http".to_owned()).spawn(run);
    let thread = thread.map_err(system("cannot start the thread of the status page".to_owned()))?;
    let handle =
        started.recv().map_err(|_| Error::Stopped)?.map_err(system("cannot serve the status page".to_owned()))?;
    tell(address);
    Ok(StatusPage { handle, thread: Some(thread) })
}

fn tell(address: SocketAddr) {
    info!("status page at http://{address}");
    if !address.ip().is_loopback() {
        warn!("the status page listens beyond loopback: whoever reaches it can read it");
    }
}

fn server(listener: TcpListener, config: &Http, watcher: Watcher) -> std::io::Result<actix_web::dev::Server> {
    let watcher = Data::new(watcher);
    let app = move || {
        App::new()
            .app_data(watcher.clone())
            .route("/live", web::get().to(live))
            .route("/ready", web::get().to(ready))
            .route("/status", web::get().to(status))
            .route("/metrics", web::get().to(metrics))
            .default_service(web::to(elsewhere))
    };
    let server = HttpServer::new(app)
        .workers(1)
        .max_connections(config.max_connections)
        .client_request_timeout(Duration::from_secs_f64(config.request_timeout))
        .client_disconnect_timeout(DISCONNECT)
        .keep_alive(KEEP_ALIVE)
        .shutdown_timeout(0)
        .disable_signals()
        .listen(listener)?;
    Ok(server.run())
}

/// The process runs; whether it is of use is said by `/ready`.
async fn live() -> &'static str {
    "live\n"
}

async fn ready(watcher: Data<Watcher>) -> HttpResponse {
    match watcher.status().problem {
        None => HttpResponse::Ok().content_type(ContentType::plaintext()).body("ready\n"),
        Some(problem) => {
            HttpResponse::ServiceUnavailable().content_type(ContentType::plaintext()).body(format!("{problem}\n"))
        }
    }
}

async fn status(watcher: Data<Watcher>) -> HttpResponse {
    let text = serde_json::to_string_pretty(&watcher.status()).expect("a status is numbers, texts and lists");
    HttpResponse::Ok().content_type(ContentType::json()).body(text + "\n")
}

async fn metrics(watcher: Data<Watcher>) -> HttpResponse {
    HttpResponse::Ok().content_type(PROMETHEUS_TEXT).body(metrics::render(&watcher.status()))
}

async fn elsewhere() -> HttpResponse {
    let text = "there are GET /live, /ready, /status and /metrics\n";
    HttpResponse::NotFound().content_type(ContentType::plaintext()).body(text)
}

fn system(what: String) -> impl FnOnce(std::io::Error) -> Error {
    |source| Error::System { what, source }
}

impl Drop for StatusPage {
    fn drop(&mut self) {
        // The command is on its way once the future is made; the join below waits for its effect.
        drop(self.handle.stop(false));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread of the status page panicked");
        }
    }
}
