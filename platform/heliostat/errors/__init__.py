"""Every error that Heliostat raises on purpose.

    HeliostatError
    ├── DefinitionError            a declaration contradicts itself or the registry (errors/declarations.py)
    │   ├── UnknownColumnError  UnknownFeatureError  UnknownViewError  UnknownSourceError
    │   ├── DuplicateNameError  WindowError  ExpressionError  InvalidDefinitionError
    │   └── DefinitionConflictError
    ├── SettingsError              a setting is unknown, malformed or contradicts another (errors/declarations.py)
    │   └── MissingExtraError  UnknownSettingError
    ├── DataError                  rows, files or columns that don't fit (errors/data.py)
    │   ├── MissingFileError  SchemaMismatchError  KeyColumnError  InvalidValueError
    │   ├── SignatureMismatchError  InvalidPackageError  InvalidRouteError  TrainingDataError
    │   └── UndefinedMetricError  ExperimentDataError  MonitoringDataError  SpineError
    ├── TrainingFailedError        a search or a fit broke down on the cluster (errors/data.py)
    ├── RequestError               a request that can't be read (errors/requests.py)
    │   ├── BodyTooLargeError  TooManyEventsError  MalformedBodyError  InvalidFieldError
    │   ├── UnknownOverrideError  MissingInputError  VersionNotServingError  SlowBodyError
    │   └── UnknownVariantError  ForcedVariantError
    ├── ServingError               the service can't answer now (errors/requests.py)
    │   ├── OverloadedError  ShuttingDownError  DeadlineError  UnservableModelError
    │   ├── StaleVersionError  PredictionLogError  DeploymentFailedError  BatchResultError
    │   └── DependencyOpenError  DegradedAnswerError  HungModelError  ModelTooLargeError
    ├── GatewayError               a request that a gateway refused, in the gateway's words (errors/requests.py)
    │   └── GatewayUnreachableError
    ├── AccessError                a request isn't allowed (errors/access.py)
    │   └── MissingKeyError  InvalidKeyError  MissingScopeError  NotLocalError
    ├── UnprotectedIngressError    an ingress would be open to everybody (errors/access.py)
    ├── NotFoundError              the thing asked for doesn't exist (errors/states.py)
    │   ├── UnknownModelError  UnknownVersionError  UnknownAliasError  UnknownEntityError
    │   └── UnknownTableError  UnknownKeyError  UnknownPredictionError
    ├── ConflictError              somebody else was first, or a rule forbids it (errors/states.py)
    │   ├── PromotionConflictError  CategoryCollisionError  GateFailedError  ViewInUseError
    │   ├── RollbackError  RolloutError  MaterializationConflictError  StaleProgressError
    │   └── HistoryNeededError  EntityBusyError  KeyNameTakenError
    └── StorageError               a store can't be reached, or can't be trusted (errors/storage.py)
        ├── OnlineStoreUnavailableError  RingCorruptError  CatalogUnavailableError
        ├── CatalogSchemaError  ArtifactStoreError  ArtifactMissingError  ArtifactCorruptError
        ├── EmbeddedServerError  TableUnavailableError  TableCommitError  BucketCountError
        ├── ServingUnavailableError  StreamEntryError  KafkaUnavailableError  StorageNotSharedError
        └── KeysUnavailableError

Each says what was asked, what exists and what to do. Each survives pickling, since Ray
carries errors between processes: the constructor's arguments equal ``args``, and the
text is built in ``__str__``.

``http_status`` is what the gateway answers; ``exit_code`` is what a job or the command
line ends with (see docs/operations.md).
"""

from __future__ import annotations

from heliostat.errors.access import (
    AccessError,
    InvalidKeyError,
    KeyNameTakenError,
    KeysUnavailableError,
    MissingKeyError,
    MissingScopeError,
    NotLocalError,
    UnknownKeyError,
    UnprotectedIngressError,
)
from heliostat.errors.base import (
    HeliostatError,
)
from heliostat.errors.data import (
    DataError,
    ExperimentDataError,
    InvalidPackageError,
    InvalidRouteError,
    InvalidValueError,
    KeyColumnError,
    MissingFileError,
    MonitoringDataError,
    SchemaMismatchError,
    SignatureMismatchError,
    SpineError,
    TrainingDataError,
    TrainingFailedError,
    UndefinedMetricError,
)
from heliostat.errors.declarations import (
    DefinitionConflictError,
    DefinitionError,
    DuplicateNameError,
    ExpressionError,
    InvalidDefinitionError,
    MissingExtraError,
    SettingsError,
    UnknownColumnError,
    UnknownFeatureError,
    UnknownSettingError,
    UnknownSourceError,
    UnknownViewError,
    WindowError,
)
from heliostat.errors.requests import (
    BatchResultError,
    BodyTooLargeError,
    DeadlineError,
    DegradedAnswerError,
    DependencyOpenError,
    DeploymentFailedError,
    ForcedVariantError,
    GatewayError,
    GatewayUnreachableError,
    HungModelError,
    InvalidFieldError,
    MalformedBodyError,
    MissingInputError,
    ModelTooLargeError,
    OverloadedError,
    PredictionLogError,
    RequestError,
    ServingError,
    ShuttingDownError,
    SlowBodyError,
    StaleVersionError,
    TooManyEventsError,
    UnknownOverrideError,
    UnknownVariantError,
    UnservableModelError,
    VersionNotServingError,
)
from heliostat.errors.states import (
    CategoryCollisionError,
    ConflictError,
    EntityBusyError,
    GateFailedError,
    HistoryNeededError,
    MaterializationConflictError,
    NotFoundError,
    PromotionConflictError,
    RollbackError,
    RolloutError,
    StaleProgressError,
    UnknownAliasError,
    UnknownEntityError,
    UnknownModelError,
    UnknownPredictionError,
    UnknownTableError,
    UnknownVersionError,
    ViewInUseError,
)
from heliostat.errors.storage import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStoreError,
    BucketCountError,
    CatalogSchemaError,
    CatalogUnavailableError,
    EmbeddedServerError,
    KafkaUnavailableError,
    OnlineStoreUnavailableError,
    RingCorruptError,
    ServingUnavailableError,
    StorageError,
    StorageNotSharedError,
    StreamEntryError,
    TableCommitError,
    TableUnavailableError,
)

__all__ = [
    "AccessError",
    "ArtifactCorruptError",
    "ArtifactMissingError",
    "ArtifactStoreError",
    "BatchResultError",
    "BodyTooLargeError",
    "BucketCountError",
    "CatalogSchemaError",
    "CatalogUnavailableError",
    "CategoryCollisionError",
    "ConflictError",
    "DataError",
    "DeadlineError",
    "DefinitionConflictError",
    "DefinitionError",
    "DegradedAnswerError",
    "DependencyOpenError",
    "DeploymentFailedError",
    "DuplicateNameError",
    "EmbeddedServerError",
    "EntityBusyError",
    "ExperimentDataError",
    "ExpressionError",
    "ForcedVariantError",
    "GateFailedError",
    "GatewayError",
    "GatewayUnreachableError",
    "HeliostatError",
    "HistoryNeededError",
    "HungModelError",
    "InvalidDefinitionError",
    "InvalidFieldError",
    "InvalidKeyError",
    "InvalidPackageError",
    "InvalidRouteError",
    "InvalidValueError",
    "KafkaUnavailableError",
    "KeyColumnError",
    "KeyNameTakenError",
    "KeysUnavailableError",
    "MalformedBodyError",
    "MaterializationConflictError",
    "MissingExtraError",
    "MissingFileError",
    "MissingInputError",
    "MissingKeyError",
    "MissingScopeError",
    "ModelTooLargeError",
    "MonitoringDataError",
    "NotFoundError",
    "NotLocalError",
    "OnlineStoreUnavailableError",
    "OverloadedError",
    "PredictionLogError",
    "PromotionConflictError",
    "RequestError",
    "RingCorruptError",
    "RollbackError",
    "RolloutError",
    "SchemaMismatchError",
    "ServingError",
    "ServingUnavailableError",
    "SettingsError",
    "ShuttingDownError",
    "SignatureMismatchError",
    "SlowBodyError",
    "SpineError",
    "StaleProgressError",
    "StaleVersionError",
    "StorageError",
    "StorageNotSharedError",
    "StreamEntryError",
    "TableCommitError",
    "TableUnavailableError",
    "TooManyEventsError",
    "TrainingDataError",
    "TrainingFailedError",
    "UndefinedMetricError",
    "UnknownAliasError",
    "UnknownColumnError",
    "UnknownEntityError",
    "UnknownFeatureError",
    "UnknownKeyError",
    "UnknownModelError",
    "UnknownOverrideError",
    "UnknownPredictionError",
    "UnknownSettingError",
    "UnknownSourceError",
    "UnknownTableError",
    "UnknownVariantError",
    "UnknownVersionError",
    "UnknownViewError",
    "UnprotectedIngressError",
    "UnservableModelError",
    "VersionNotServingError",
    "ViewInUseError",
    "WindowError",
]
