"""JobSet v1alpha2 as JSON schema, written from its public reference: strict, with the fields of Job and Pod that we use."""

TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
TEXTS = {"type": "array", "items": TEXT}


def strict(required="", **fields):
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def several(item, least=1):
    return {"type": "array", "items": item, "minItems": least}


CONTAINER = strict(
    "name image command resources",
    name=NAME, image=TEXT, workingDir=TEXT, command=TEXTS, args=TEXTS,
    env=several(strict("name valueFrom", name=TEXT, valueFrom=strict(secretKeyRef=strict("name key", name=TEXT, key=TEXT)))),
    ports=several(strict("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=strict(limits={"type": "object", "additionalProperties": COUNT}),
    volumeMounts=several(strict("name mountPath", name=NAME, mountPath=TEXT)),
)  # fmt: skip
POD = strict(
    "restartPolicy containers",
    restartPolicy={"enum": ["Never", "OnFailure"]}, terminationGracePeriodSeconds=COUNT,
    nodeSelector={"type": "object", "additionalProperties": TEXT}, containers=several(CONTAINER),
    volumes=several(
        strict(
            "name", name=NAME, persistentVolumeClaim=strict("claimName", claimName=TEXT),
            emptyDir=strict(medium={"enum": ["", "Memory"]}),
        ) | {"minProperties": 2, "maxProperties": 2}
    ),
)  # fmt: skip
JOB = strict(
    "template", parallelism=COUNT, completions=COUNT, backoffLimit=COUNT, template=strict("spec", spec=POD),
)  # fmt: skip
METADATA = strict(annotations={"type": "object", "additionalProperties": TEXT})
POLICY = strict("operator", operator={"enum": ["All", "Any"]}, targetReplicatedJobs=several(NAME))
JOBSET = strict(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict("name", name=NAME),
    spec=strict(
        "replicatedJobs",
        network=strict(enableDNSHostnames={"type": "boolean"}, subdomain=NAME),
        failurePolicy=strict(maxRestarts=COUNT),
        successPolicy=POLICY,
        replicatedJobs=several(
            strict("name template", name=NAME, replicas=COUNT, template=strict("spec", metadata=METADATA, spec=JOB)),
        ),
    ),
)
