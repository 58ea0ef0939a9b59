//! [`Dht`]: the handle through which everybody talks to the node's actor.

use std::collections::BTreeMap;

use libp2p_identity::PeerId;
use skep_kernel::{Deadline, WallTime};
use skep_wire::{ExpertPrefix, ExpertUid};

use crate::{DhtError, DhtKey, Freshness, Hosted, StoreItem, Stored, SuccessorTable, Timed};

/// Talks to the DHT node of this process, from any thread. Cheap to clone; outlives restarts of the actor behind it.
///
/// Every operation ends by its deadline; dropping a future abandons the operation.
#[derive(Clone)]
pub struct Dht {}

impl Dht {
    /// Our peer id.
    pub fn local_peer(&self) -> PeerId {
        unimplemented!()
    }

    /// Looks up several keys at once, in order; `None` where nothing valid was found.
    pub async fn get_many(
        &self,
        _keys: Vec<DhtKey>,
        _freshness: Freshness,
        _deadline: Deadline,
    ) -> Result<Vec<Option<Timed<Stored>>>, DhtError> {
        unimplemented!()
    }

    /// Stores several items at once; tells for each, in order, whether a node took it.
    pub async fn store_many(&self, _items: Vec<StoreItem>, _deadline: Deadline) -> Result<Vec<bool>, DhtError> {
        unimplemented!()
    }

    /// Who hosts these experts, in order (wire document §7.2).
    pub async fn find_experts(
        &self,
        _uids: Vec<ExpertUid>,
        _freshness: Freshness,
        _deadline: Deadline,
    ) -> Result<Vec<Option<Hosted>>, DhtError> {
        unimplemented!()
    }

    /// Next coordinates under each prefix (wire document §7.2, §7.3), all prefixes in one batched search. Entries whose
    /// peer is banned are left out. Malformed records are ignored.
    pub async fn successors(
        &self,
        _prefixes: Vec<ExpertPrefix>,
        _deadline: Deadline,
    ) -> Result<SuccessorTable, DhtError> {
        unimplemented!()
    }

    /// Announces experts hosted by this node until `expiration`: one store of all their records (wire document §7.2).
    /// Tells for each uid whether its record was taken.
    pub async fn declare_experts(
        &self,
        _uids: Vec<ExpertUid>,
        _expiration: WallTime,
        _deadline: Deadline,
    ) -> Result<BTreeMap<ExpertUid, bool>, DhtError> {
        unimplemented!()
    }

    /// Overwrites our own records of these experts so that they vanish at once (design §6).
    pub async fn withdraw_experts(&self, _uids: Vec<ExpertUid>, _deadline: Deadline) -> Result<(), DhtError> {
        unimplemented!()
    }

    /// Completes once the node has joined: at once without initial peers, else when one of them has answered. On the
    /// deadline the error names the step that fails.
    pub async fn joined(&self, _deadline: Deadline) -> Result<(), DhtError> {
        unimplemented!()
    }
}
