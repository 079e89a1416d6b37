"""Which switches go together: the rules between the tables of a run file.

A rule looks at all tables and raises for what makes no sense together. Only the first that fails is
reported, so `RULES` has the most telling ones first.
"""

from __future__ import annotations

from collections.abc import Callable

from mpifedlora.core.fault_rules import FAULT_RULES
from mpifedlora.core.method_config import RunTables
from mpifedlora.core.refusals import bars, needs, needs_one_scope, refuse, switch, value_of
from mpifedlora.core.task_rules import TASK_RULES

_UNLASTING = {
    "product": "every SVD gives a new basis, so {} of the last round mean nothing",
    "stack": "the adapter is restarted every round, so {} of the last round mean nothing",
    "residual": "what {} change would no longer be what the exact residual completes",
    "zero-pad": "the zeros of a padded factor are no step of its client, and {} would take them for one",
}
_UNSTACKED = ("product", "factors", "zero-pad", "residual")
_AFRESH = "under stack nothing is carried over a cut"


def _stages_fit(config: RunTables) -> None:
    if config.initiating.rounds > config.federation.num_rounds:
        refuse(
            "initiating.rounds must be at most federation.num_rounds",
            f"{config.initiating.rounds} and {config.federation.num_rounds}",
            "lower initiating.rounds",
        )


def _full_follows_no_adapter(config: RunTables) -> None:
    initiating = config.initiating
    if initiating.rounds and initiating.scope == "adapter" and config.training.scope == "full":
        refuse(
            "the whole model cannot be trained after an adapter",
            'initiating.scope = "adapter" and training.scope = "full"',
            'set initiating.scope = "full", or initiating.rounds = 0',
        )


def _cooling_fits(config: RunTables) -> None:
    num_rounds, initiating = config.federation.num_rounds, config.initiating.rounds
    heating, cooling = config.annealing.heating_rounds, config.annealing.cooling_rounds or 1
    least, room = initiating + heating + cooling, num_rounds - initiating - cooling
    if config.annealing.schedule != "constant" and initiating < num_rounds < least:
        lower = f"annealing.heating_rounds to {room}" if room >= 0 else "annealing.cooling_rounds"
        refuse(
            f"federation.num_rounds must be at least {least} ({initiating} of initiating.rounds, "
            f"{heating} of annealing.heating_rounds, {cooling} of cooling)",
            str(num_rounds),
            f"raise it, or lower {lower}",
        )


def _validation_is_there(config: RunTables) -> None:
    for key, value in (
        ("evaluation.split", "validation"),
        ("annealing.schedule", "metropolis"),
        ("annealing.schedule", "target"),
    ):
        if value_of(config, key) == value and config.data.validation_fraction == 0:
            refuse(
                f'{key} = "{value}" needs a validation part',
                "data.validation_fraction = 0",
                "set data.validation_fraction, for example to 0.1",
            )


def _held_out_parts_stay_with_their_clients(config: RunTables) -> None:
    if config.data.partition != "files" or config.data.test_source is not None:
        return
    subject = 'data.partition = "files" without data.test_source'
    if config.evaluation.on != "workers":
        refuse(
            f'{subject} needs evaluation.on = "workers" (what a client holds out is measured by its worker)',
            switch(config, "evaluation.on"),
            'set evaluation.on = "workers", or name a data.test_source that all see',
        )
    if config.annealing.schedule in ("metropolis", "target"):
        refuse(
            f'{switch(config, "annealing.schedule")} needs data.test_source under data.partition = "files" '
            "(the server measures cuts, and sees nothing of what clients hold out)",
            "none",
            "name a data.test_source that all see, or choose another schedule",
        )


def _kept_b_stays_with_its_client(config: RunTables) -> None:
    if config.training.personal == "none":
        return
    subject, unseen = switch(config, "training.personal"), "the server never sees B"
    needs(config, subject, "training.scope", "adapter", why="A and B are both trained")
    needs(config, subject, "initiating.rounds", 0, why="B is kept from the first round on")
    needs(config, subject, "aggregation.weights", "examples", "equal", why=unseen)
    needs(config, subject, "aggregation.robust", "none", why=unseen)
    bars(config, subject, "aggregation.norm_bound", unseen)


def _fixed_factor_is_not_cut(config: RunTables) -> None:
    is_kept = config.training.personal != "none"
    if not is_kept and config.training.scope not in ("b-only", "alternating"):
        return
    subject = switch(config, "training.personal" if is_kept else "training.scope")
    uncut, apart = "a fixed or kept factor cannot be cut", "a fixed or kept factor is averaged as it is"
    needs(config, subject, "annealing.schedule", "constant", why=uncut)
    needs(config, subject, "aggregation.kind", "factors", why=apart)
    needs(config, subject, "annealing.allocation", "uniform", why=uncut)
    for key in ("lora.client_ranks", "lora.client_capacities"):
        bars(config, subject, key, uncut)


def _personal_models_are_measured(config: RunTables) -> None:
    if config.training.personal != "none":
        why = "a personal method has no global model to measure"
        needs(config, switch(config, "training.personal"), "evaluation.model", "personal", why=why)
    if config.evaluation.model == "personal":
        why = "else no client has a model of its own"
        needs(config, 'evaluation.model = "personal"', "training.personal", "b", "b-and-head", why=why)


def _client_ranks_fit(config: RunTables) -> None:
    lora = config.lora
    given = lora.client_capacities if lora.client_ranks is None else lora.client_ranks
    if given is None:
        return
    subject = "lora.client_capacities" if lora.client_ranks is None else "lora.client_ranks"
    if len(given) > config.federation.num_clients:
        refuse(
            f"{subject} must have at most federation.num_clients entries",
            f"{len(given)} and {config.federation.num_clients}",
            "shorten the list",
        )
    shapes = "clients of unlike rank have factors of unlike shape"
    needs(config, subject, "training.scope", "adapter", why="only an adapter has a rank")
    needs_one_scope(config, subject, "only an adapter has a rank")
    needs(config, subject, "aggregation.kind", "product", "zero-pad", "stack", why=shapes)
    needs(config, subject, "training.control_variates", False, why=f"SCAFFOLD with rank lists: {shapes}")
    needs(config, subject, "server_optimizer.kind", "none", why=shapes)


def _privacy_holds(config: RunTables) -> None:
    if config.privacy.clip_norm is None:
        if config.privacy.noise_multiplier > 0:
            refuse(
                "privacy.noise_multiplier needs privacy.clip_norm (noise without clipping is no privacy)",
                "none",
                "set privacy.clip_norm, or leave privacy.noise_multiplier out",
            )
        return
    subject, bounded = "privacy.clip_norm", "one client may move the sum by no more than clip_norm"
    why = (
        "clipping factors does not bound their product, and noise in A multiplies noise in B, under "
        'aggregation.kind = "product" as under "factors": FFA-LoRA, arXiv 2403.12313'
    )
    needs(config, subject, "training.scope", "b-only", "full", why=why)
    needs_one_scope(config, subject, why)
    needs(config, subject, "aggregation.weights", "equal", why=bounded)
    needs(config, subject, "aggregation.robust", "none", why=bounded)
    bars(config, subject, "aggregation.norm_bound", bounded)
    needs(config, subject, "training.control_variates", False, why="variates would be sent without noise")
    needs(
        config, subject, "faults.min_clients", 1, why="one client more or less would decide over all others"
    )
    if config.federation.cohort_size is not None:
        why = "the accountant knows cohorts of clients that are drawn independently only"
        needs(config, subject, "federation.sampling", "poisson", why=why)


def _state_lasts(config: RunTables, subject: str, state: str) -> None:
    """Refuse what lives in the space of the parameters across rounds where that space does not last."""
    scope, kind = config.training.scope, config.aggregation.kind
    why = f"{state} of the last round belong to the other factor"
    needs(config, subject, "training.scope", "full", "b-only", "adapter", why=why)
    if scope == "adapter":
        why = _UNLASTING.get(kind, "").format(state)
        needs(config, subject, "aggregation.kind", "factors", why=why)
    needs(config, subject, "training.personal", "none", why="the server never sees B")


def _server_optimizer_lasts(config: RunTables) -> None:
    if config.server_optimizer.kind != "none":
        _state_lasts(config, switch(config, "server_optimizer.kind"), "moments")


def _variates_are_mean_gradients(config: RunTables) -> None:
    if not config.training.control_variates:
        return
    subject = "training.control_variates = true"
    _state_lasts(config, subject, "variates")
    needs_one_scope(config, subject, "variates are kept from round to round")
    why = "variates are mean gradients, (x - y) / (steps * learning_rate)"
    needs(config, subject, "training.optimizer", "sgd", why=why)
    needs(config, subject, "training.head_rate_factor", 1.0, why=why)
    for key in ("training.momentum", "training.mu", *["initiating.mu"] * (config.initiating.rounds > 0)):
        needs(config, subject, key, 0, why=why)


def _cohort_outnumbers_the_byzantine(config: RunTables) -> None:
    robust, num_byzantine = config.aggregation.robust, config.aggregation.num_byzantine
    extra = {"krum": 3, "multi-krum": 3, "trimmed-mean": 1}.get(robust)
    key = "federation.num_clients" if config.federation.cohort_size is None else "federation.cohort_size"
    if extra is not None and value_of(config, key) < 2 * num_byzantine + extra:
        refuse(
            f'aggregation.robust = "{robust}" needs a cohort of at least 2 * aggregation.num_byzantine + '
            f"{extra} = {2 * num_byzantine + extra} clients",
            switch(config, key),
            f"raise {key}, or lower aggregation.num_byzantine",
        )


def _robust_mean_has_a_basis(config: RunTables) -> None:
    if config.aggregation.robust not in ("median", "trimmed-mean"):
        return
    subject, why = switch(config, "aggregation.robust"), "in the space of factors the basis is arbitrary"
    if config.training.scope == "adapter":
        needs(config, subject, "aggregation.kind", "product", why=why)
    elif config.initiating.scope == "adapter":
        needs_one_scope(config, subject, why)


def _base_takes_what_is_folded(config: RunTables) -> None:
    if config.training.scope == "adapter" and config.aggregation.kind in ("stack", "residual"):
        why = "what is added to the base every round would be rounded away"
        needs(config, switch(config, "aggregation.kind"), "model.dtype", "float32", why=why)


def _cuts_can_be_judged(config: RunTables) -> None:
    if config.annealing.schedule not in ("metropolis", "target"):
        return
    subject = switch(config, "annealing.schedule")
    needs(config, subject, "training.scope", "adapter", why="only an adapter has a rank to cut")
    if config.annealing.schedule == "metropolis":
        needs(config, subject, "annealing.cut", "drop", why="what was frozen cannot be taken back")
        why = "under residual the base takes what is cut, and under stack nothing is carried over a cut"
        needs(config, subject, "aggregation.kind", "product", "factors", "zero-pad", why=why)
    needs(config, subject, "aggregation.kind", *_UNSTACKED, why=_AFRESH)


def _spectrum_is_known(config: RunTables) -> None:
    if config.annealing.allocation == "spectral":
        subject = 'annealing.allocation = "spectral"'
        needs(config, subject, "training.scope", "adapter", why="only an adapter has ranks to share out")
        needs(config, subject, "aggregation.kind", *_UNSTACKED, why=_AFRESH)


def _frobenius_norm_is_there(config: RunTables) -> None:
    if config.aggregation.weights == "frobenius":
        subject, why = 'aggregation.weights = "frobenius"', "it is the norm of B @ A"
        needs(config, subject, "training.scope", "adapter", why=why)
        needs_one_scope(config, subject, why)


def _sums_are_plain(config: RunTables) -> None:
    if config.transport.collect == "reduce":
        check_reducible(config)


def check_reducible(config: RunTables) -> None:
    """Raise unless the workers can add up their clients' updates before the server sees any.

    Raises:
        ValueError: naming the switch that needs single updates.
    """
    subject, why = 'transport.collect = "reduce"', "only a mean of values can be added up on the way"
    order = "the order of the sum, and so its bits, depend on the number of workers"
    needs(config, subject, "federation.reproducible", False, why=order)
    if config.training.scope == "adapter":
        needs(config, subject, "aggregation.kind", "factors", why=why)
    needs(config, subject, "aggregation.weights", "examples", "equal", why=why)
    needs(config, subject, "aggregation.robust", "none", why=why)
    bars(config, subject, "aggregation.norm_bound", why)
    bars(config, subject, "privacy.clip_norm", "the server clips each update again")
    needs(config, subject, "training.control_variates", False, why=why)
    needs(config, subject, "transport.uplink_dtype", "float32", why="MPI adds up floats")


def _rounding_is_harmless(config: RunTables) -> None:
    for key in ("transport.uplink_dtype", "transport.downlink_dtype"):
        if value_of(config, key) == "float32":
            continue
        subject, why = switch(config, key), "variates are kept, and their rounding would add up"
        needs(config, subject, "training.control_variates", False, why=why)
        if value_of(config, key) == "int8" and config.training.scope == "adapter":
            why = "an exact sum is what stack and residual are for"
            needs(config, subject, "aggregation.kind", "product", "factors", "zero-pad", why=why)


def _losses_have_a_basis(config: RunTables) -> None:
    transport = config.transport
    if not transport.error_feedback:
        return
    subject = "transport.error_feedback = true"
    _state_lasts(config, subject, "losses")
    if transport.uplink_dtype == transport.downlink_dtype == "float32":
        refuse(
            f"{subject} needs a wire dtype that rounds",
            'transport.uplink_dtype = "float32" and transport.downlink_dtype = "float32"',
            'set one of them, for example to "int8", or leave transport.error_feedback out',
        )


def _compiled_code_may_differ(config: RunTables) -> None:
    if config.training.compile:
        why = "compiled kernels give other bits than eager ones, and on other machines"
        needs(config, "training.compile = true", "federation.reproducible", False, why=why)


RULES: tuple[Callable[[RunTables], None], ...] = (
    *TASK_RULES,
    _stages_fit,
    _full_follows_no_adapter,
    _cooling_fits,
    _kept_b_stays_with_its_client,
    _fixed_factor_is_not_cut,
    _personal_models_are_measured,
    _client_ranks_fit,
    _privacy_holds,
    _server_optimizer_lasts,
    _variates_are_mean_gradients,
    _cohort_outnumbers_the_byzantine,
    _robust_mean_has_a_basis,
    _base_takes_what_is_folded,
    _cuts_can_be_judged,
    _spectrum_is_known,
    _frobenius_norm_is_there,
    _held_out_parts_stay_with_their_clients,
    _validation_is_there,
    _sums_are_plain,
    _rounding_is_harmless,
    _losses_have_a_basis,
    _compiled_code_may_differ,
    *FAULT_RULES,
)
