"""One round: what a device uploads, and what the coordinator makes of the sum."""

from fedcore.pipeline.bound import BoundRound, bind_round
from fedcore.pipeline.buffer import Buffer, staleness_weight
from fedcore.pipeline.central import CoordinatorNoise, FreshNoise
from fedcore.pipeline.choices import (
    Bonawitz,
    ByExamples,
    Modular,
    NoSecAgg,
    SeedHelper,
    Uniform,
)
from fedcore.pipeline.clear import ClearSum
from fedcore.pipeline.clipping import AdaptiveClip, Layer, PerLayerClip, first_norm
from fedcore.pipeline.collect import MeanUpdate, agreed_names, decode_sum
from fedcore.pipeline.correlated import NoiseTape
from fedcore.pipeline.envelope import BOX, PART, RECORD, VECTOR, VECTOR_TYPE, Envelope, typed
from fedcore.pipeline.model import model_digest
from fedcore.pipeline.plan import RunPlan
from fedcore.pipeline.round_plan import RoundPlan
from fedcore.pipeline.selection import layers_of, support_of
from fedcore.pipeline.shares import ByClass, Shares, Trainers, Whole, sent_by, trainers_of
from fedcore.pipeline.target import bind_first, projected_epsilon, resolve, with_noise
from fedcore.pipeline.upload import LocalUpdate, Upload, left_out, make_upload

__all__ = [
    "BOX",
    "PART",
    "RECORD",
    "VECTOR",
    "VECTOR_TYPE",
    "AdaptiveClip",
    "Bonawitz",
    "BoundRound",
    "Buffer",
    "ByClass",
    "ByExamples",
    "ClearSum",
    "CoordinatorNoise",
    "Envelope",
    "FreshNoise",
    "Layer",
    "LocalUpdate",
    "MeanUpdate",
    "Modular",
    "NoSecAgg",
    "NoiseTape",
    "PerLayerClip",
    "RoundPlan",
    "RunPlan",
    "SeedHelper",
    "Shares",
    "Trainers",
    "Uniform",
    "Upload",
    "Whole",
    "agreed_names",
    "bind_first",
    "bind_round",
    "decode_sum",
    "first_norm",
    "layers_of",
    "left_out",
    "make_upload",
    "model_digest",
    "projected_epsilon",
    "resolve",
    "sent_by",
    "staleness_weight",
    "support_of",
    "trainers_of",
    "typed",
    "with_noise",
]
