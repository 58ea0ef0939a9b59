//! A server and a client on the simulated network.

use skep_expert::{HostedExpert, Server, ServerConfig};
use skep_kernel::Deadline;
use skep_rpc::{Answer, Body, Call, Meta, RequestId, Router, RpcError, TensorBody, Transport};
use skep_testkit::{Sim, SimTransport};
use skep_wire::{
    Compression, HostTensor, Method,
    compression::{compress, decompress},
};

use super::{server_parts, start_parts, within};

/// A server on the simulated network and a client beside it.
pub struct Hive {
    pub sim: Sim,
    pub server: Server,
    pub at: SimTransport,
    pub client: SimTransport,
}

impl Hive {
    pub async fn with(sim: &Sim, config: ServerConfig, experts: Vec<HostedExpert>) -> Self {
        let router = Router::new();
        let (at, client) = (sim.network().node(router.clone()), sim.network().client());
        let mut parts = server_parts(sim, config);
        parts.router = router;
        let server = start_parts(sim, parts, experts).await;
        Self { sim: sim.clone(), server, at, client }
    }

    pub async fn call(&self, method: Method, body: Body) -> Result<Answer, RpcError> {
        let deadline = within(&self.sim, 10_000);
        self.call_as(method, body, RequestId(1), deadline).await
    }

    pub async fn call_as(
        &self,
        method: Method,
        body: Body,
        request_id: RequestId,
        deadline: Deadline,
    ) -> Result<Answer, RpcError> {
        let meta = Meta { deadline, request_id, trace: None };
        self.client.call(Call { peer: self.at.local_peer(), method, body, meta }).await
    }
}

pub fn body(uid: &str, tensors: &[HostTensor]) -> Body {
    let tensors = tensors.iter().map(|tensor| compress(tensor, Compression::None).unwrap()).collect();
    Body::Tensors(TensorBody { uid: uid.to_owned(), tensors })
}

pub fn tensors(answer: Answer) -> Vec<HostTensor> {
    let Body::Tensors(body) = answer.body else { panic!("tensors are expected") };
    body.tensors.iter().map(|tensor| decompress(tensor).unwrap()).collect()
}
