from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Agreement(_message.Message):
    __slots__ = ("protocol", "transformers_major", "task", "model_type", "revision", "config_digest", "layer_digests", "num_layers", "lower", "upper", "dtype", "attn_implementation", "quantization")
    class LayerDigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TRANSFORMERS_MAJOR_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYER_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTN_IMPLEMENTATION_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    transformers_major: str
    task: str
    model_type: str
    revision: str
    config_digest: str
    layer_digests: _containers.ScalarMap[int, str]
    num_layers: int
    lower: int
    upper: int
    dtype: str
    attn_implementation: str
    quantization: str
    def __init__(self, protocol: _Optional[int] = ..., transformers_major: _Optional[str] = ..., task: _Optional[str] = ..., model_type: _Optional[str] = ..., revision: _Optional[str] = ..., config_digest: _Optional[str] = ..., layer_digests: _Optional[_Mapping[int, str]] = ..., num_layers: _Optional[int] = ..., lower: _Optional[int] = ..., upper: _Optional[int] = ..., dtype: _Optional[str] = ..., attn_implementation: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class AttestRequest(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class AttestReply(_message.Message):
    __slots__ = ("evidence",)
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    evidence: bytes
    def __init__(self, evidence: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Offer(_message.Message):
    __slots__ = ("agreement", "model_id", "version", "codecs", "optimizers", "keeps_adapter", "max_message_bytes", "max_rank", "idle_timeout_s", "lease_s", "row_ttl_s")
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    ROW_TTL_S_FIELD_NUMBER: _ClassVar[int]
    agreement: Agreement
    model_id: str
    version: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    optimizers: _containers.RepeatedScalarFieldContainer[str]
    keeps_adapter: bool
    max_message_bytes: int
    max_rank: int
    idle_timeout_s: float
    lease_s: float
    row_ttl_s: float
    def __init__(self, agreement: _Optional[_Union[Agreement, _Mapping]] = ..., model_id: _Optional[str] = ..., version: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., optimizers: _Optional[_Iterable[str]] = ..., keeps_adapter: bool = ..., max_message_bytes: _Optional[int] = ..., max_rank: _Optional[int] = ..., idle_timeout_s: _Optional[float] = ..., lease_s: _Optional[float] = ..., row_ttl_s: _Optional[float] = ...) -> None: ...

class LoraModule(_message.Message):
    __slots__ = ("name", "rank", "alpha")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    alpha: float
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ...) -> None: ...

class LoraSpec(_message.Message):
    __slots__ = ("modules", "dropout", "use_rslora", "use_dora", "gaussian_init", "fan_in_fan_out", "seed")
    MODULES_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    USE_DORA_FIELD_NUMBER: _ClassVar[int]
    GAUSSIAN_INIT_FIELD_NUMBER: _ClassVar[int]
    FAN_IN_FAN_OUT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    modules: _containers.RepeatedCompositeFieldContainer[LoraModule]
    dropout: float
    use_rslora: bool
    use_dora: bool
    gaussian_init: bool
    fan_in_fan_out: bool
    seed: int
    def __init__(self, modules: _Optional[_Iterable[_Union[LoraModule, _Mapping]]] = ..., dropout: _Optional[float] = ..., use_rslora: bool = ..., use_dora: bool = ..., gaussian_init: bool = ..., fan_in_fan_out: bool = ..., seed: _Optional[int] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("agreement", "lora", "run", "gradient_checkpointing", "take_up", "rows", "codecs")
    class CodecsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    TAKE_UP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    agreement: Agreement
    lora: LoraSpec
    run: str
    gradient_checkpointing: bool
    take_up: bool
    rows: str
    codecs: _containers.ScalarMap[str, str]
    def __init__(self, agreement: _Optional[_Union[Agreement, _Mapping]] = ..., lora: _Optional[_Union[LoraSpec, _Mapping]] = ..., run: _Optional[str] = ..., gradient_checkpointing: bool = ..., take_up: bool = ..., rows: _Optional[str] = ..., codecs: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class OpenSessionReply(_message.Message):
    __slots__ = ("session", "parameters", "keeps_adapter")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    session: str
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    keeps_adapter: bool
    def __init__(self, session: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., keeps_adapter: bool = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session", "keep_rows")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEEP_ROWS_FIELD_NUMBER: _ClassVar[int]
    session: str
    keep_rows: bool
    def __init__(self, session: _Optional[str] = ..., keep_rows: bool = ...) -> None: ...

class CloseSessionReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorMeta(_message.Message):
    __slots__ = ("name", "dtype", "shape", "codec", "nbytes", "centred")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CENTRED_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    nbytes: int
    centred: bool
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., nbytes: _Optional[int] = ..., centred: bool = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("sequence", "tensors", "follows", "received", "forward", "backward", "optim_step", "zero_grad", "discard", "drop_cache", "export_adapter", "import_adapter", "save_state", "load_state", "echo", "commit", "release", "mark", "retain", "keep_rows", "calibrate", "done", "working", "failure", "attached", "missing")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    ZERO_GRAD_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    DROP_CACHE_FIELD_NUMBER: _ClassVar[int]
    EXPORT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    IMPORT_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    KEEP_ROWS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    follows: int
    received: int
    forward: Forward
    backward: Backward
    optim_step: OptimStep
    zero_grad: ZeroGrad
    discard: Discard
    drop_cache: DropCache
    export_adapter: ExportAdapter
    import_adapter: ImportAdapter
    save_state: SaveState
    load_state: LoadState
    echo: Echo
    commit: Commit
    release: Release
    mark: Mark
    retain: Retain
    keep_rows: KeepRows
    calibrate: Calibrate
    done: Done
    working: Working
    failure: Failure
    attached: Attached
    missing: Missing
    def __init__(self, sequence: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., follows: _Optional[int] = ..., received: _Optional[int] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., optim_step: _Optional[_Union[OptimStep, _Mapping]] = ..., zero_grad: _Optional[_Union[ZeroGrad, _Mapping]] = ..., discard: _Optional[_Union[Discard, _Mapping]] = ..., drop_cache: _Optional[_Union[DropCache, _Mapping]] = ..., export_adapter: _Optional[_Union[ExportAdapter, _Mapping]] = ..., import_adapter: _Optional[_Union[ImportAdapter, _Mapping]] = ..., save_state: _Optional[_Union[SaveState, _Mapping]] = ..., load_state: _Optional[_Union[LoadState, _Mapping]] = ..., echo: _Optional[_Union[Echo, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., mark: _Optional[_Union[Mark, _Mapping]] = ..., retain: _Optional[_Union[Retain, _Mapping]] = ..., keep_rows: _Optional[_Union[KeepRows, _Mapping]] = ..., calibrate: _Optional[_Union[Calibrate, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., working: _Optional[_Union[Working, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., missing: _Optional[_Union[Missing, _Mapping]] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("training", "keep_graph", "wants_gradient", "seed", "autocast", "adapter_disabled", "cache", "past_tokens", "cache_rows", "rows", "row_tokens")
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    KEEP_GRAPH_FIELD_NUMBER: _ClassVar[int]
    WANTS_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DISABLED_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    PAST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    training: bool
    keep_graph: bool
    wants_gradient: bool
    seed: int
    autocast: str
    adapter_disabled: bool
    cache: int
    past_tokens: int
    cache_rows: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    row_tokens: int
    def __init__(self, training: bool = ..., keep_graph: bool = ..., wants_gradient: bool = ..., seed: _Optional[int] = ..., autocast: _Optional[str] = ..., adapter_disabled: bool = ..., cache: _Optional[int] = ..., past_tokens: _Optional[int] = ..., cache_rows: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[bytes]] = ..., row_tokens: _Optional[int] = ...) -> None: ...

class KeepRows(_message.Message):
    __slots__ = ("rows", "row_tokens")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    row_tokens: int
    def __init__(self, rows: _Optional[_Iterable[bytes]] = ..., row_tokens: _Optional[int] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("forward_sequence", "hold", "norms")
    FORWARD_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    forward_sequence: int
    hold: int
    norms: bool
    def __init__(self, forward_sequence: _Optional[int] = ..., hold: _Optional[int] = ..., norms: bool = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("hold", "factor")
    HOLD_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    hold: int
    factor: float
    def __init__(self, hold: _Optional[int] = ..., factor: _Optional[float] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("hold",)
    HOLD_FIELD_NUMBER: _ClassVar[int]
    hold: int
    def __init__(self, hold: _Optional[int] = ...) -> None: ...

class ParamGroup(_message.Message):
    __slots__ = ("numbers", "flags", "betas", "names")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class FlagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: bool = ...) -> None: ...
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    BETAS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    numbers: _containers.ScalarMap[str, float]
    flags: _containers.ScalarMap[str, bool]
    betas: _containers.RepeatedScalarFieldContainer[float]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, numbers: _Optional[_Mapping[str, float]] = ..., flags: _Optional[_Mapping[str, bool]] = ..., betas: _Optional[_Iterable[float]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class OptimStep(_message.Message):
    __slots__ = ("step", "optimizer", "groups", "clip_factor")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    step: int
    optimizer: str
    groups: _containers.RepeatedCompositeFieldContainer[ParamGroup]
    clip_factor: float
    def __init__(self, step: _Optional[int] = ..., optimizer: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[ParamGroup, _Mapping]]] = ..., clip_factor: _Optional[float] = ...) -> None: ...

class ZeroGrad(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Discard(_message.Message):
    __slots__ = ("forward_sequence",)
    FORWARD_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    forward_sequence: int
    def __init__(self, forward_sequence: _Optional[int] = ...) -> None: ...

class DropCache(_message.Message):
    __slots__ = ("cache",)
    CACHE_FIELD_NUMBER: _ClassVar[int]
    cache: int
    def __init__(self, cache: _Optional[int] = ...) -> None: ...

class ExportAdapter(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ImportAdapter(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveState(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("step", "run")
    STEP_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    step: int
    run: str
    def __init__(self, step: _Optional[int] = ..., run: _Optional[str] = ...) -> None: ...

class Mark(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Retain(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, steps: _Optional[_Iterable[int]] = ...) -> None: ...

class Calibrate(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Echo(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Done(_message.Message):
    __slots__ = ("compute_s", "queue_s", "durable", "not_kept")
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    NOT_KEPT_FIELD_NUMBER: _ClassVar[int]
    compute_s: float
    queue_s: float
    durable: int
    not_kept: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, compute_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., durable: _Optional[int] = ..., not_kept: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("reached", "durable", "replies")
    REACHED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    reached: int
    durable: int
    replies: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reached: _Optional[int] = ..., durable: _Optional[int] = ..., replies: _Optional[_Iterable[int]] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("rows", "all")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedScalarFieldContainer[bytes]
    all: bool
    def __init__(self, rows: _Optional[_Iterable[bytes]] = ..., all: bool = ...) -> None: ...

class Working(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
