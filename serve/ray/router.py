"""PrefixRouter: Ray Serve asks it which replica gets a request. It lives where the requests come from, in a Front."""

from collections.abc import Iterable

from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.ray.prefix_index import PrefixIndex


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's types are not read
    """Sends a prompt where its beginning is cached, unless that replica has too much to do.

    The first argument of a call is the blocks of its prompt.
    """

    queue_len_response_deadline_s = 1.0  # a replica that computes on all cores may be slow to say how busy it is

    def initialize_state(self, max_blocks: int, margin: int) -> None:
        """See `PrefixIndex`; Ray passes what the deployment's config says."""
        self._index = PrefixIndex(max_blocks=max_blocks, margin=margin)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, each a rank of its own: Ray takes the first that is not full."""
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        told = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in by_name.items()}
        blocks = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # or Ray would ask again at once while all are full
            blocks = pending_request.args[0]
        return [[by_name[name]] for name in self._index.ranked(blocks, told)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A request is on its way to a replica, which may still refuse it."""
        super().on_send_request(replica_id)
        self._index.sent(_name(replica_id))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has accepted a request, which may have ended since."""
        del result
        self._index.saw(_name(replica_id), pending_request.args[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that was sent has ended, in whatever way."""
        del internal_request_id
        self._index.ended(_name(replica_id))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone."""
        super().on_replica_actor_died(replica_id)
        self._keep(self.curr_replicas)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """There are other replicas now."""
        super().update_replicas(replicas)
        self._keep(self.curr_replicas)

    def _keep(self, replicas: Iterable[ReplicaID]) -> None:
        self._index.keep([_name(each) for each in replicas])


def _name(replica: ReplicaID) -> str:
    return str(replica.unique_id)
