"""AEPO's update in PyTorch by the definitions of method.md: the learner's peer."""

from collections.abc import Sequence

import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import Qwen2_5_VLForConditionalGeneration

from data_pipeline.packing import Segment


def torch_optimizer(policy: torch.nn.Module, config: ConfigDict, learning_rate: float) -> torch.optim.Optimizer:
    """Returns AdamW as the config says, over what it trains; the rest is frozen."""
    o = config.optimizer
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(not (o.freeze_vision and ".visual." in name))
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(o.b1, o.b2), eps=o.eps, fused=True)


def torch_update(
    policy: Qwen2_5_VLForConditionalGeneration, reference: Qwen2_5_VLForConditionalGeneration,
    optimizer: torch.optim.Optimizer, leaves: Sequence[Segment], banned: np.ndarray, config: ConfigDict, batch: int = 32,
) -> dict[str, float]:  # fmt: skip
    """The same loss by the definitions of method.md, in PyTorch, with the backward pass, the gradient's norm and AdamW."""
    device = policy.device
    total, mask = 0.0, torch.tensor(banned, device=device)
    order = sorted(range(len(leaves)), key=lambda i: len(leaves[i].token_ids))
    for begin in range(0, len(order), batch):
        part = [leaves[i] for i in order[begin : begin + batch]]
        log_probs = _torch_log_probs(policy, part, mask)
        with torch.no_grad():
            d = _torch_log_probs(reference, part, mask) - log_probs
        names = part[0].token_fields
        extra = {name: torch.tensor(_padded([s.token_fields[name] for s in part]), device=device) for name in names}
        counted = extra["loss_mask"]
        d = torch.where(counted, d + log_probs.detach() - log_probs, 0.0)
        advantage = extra["advantage"]
        ratio = torch.exp(torch.where(counted, log_probs - extra["old_log_prob"], 0.0).clamp(-20, 20))
        a = config.aepo
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - a.clip_low, 1 + a.clip_high))
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * a.clip_dual), loss)
        loss = loss + extra["kl_weight"] * (torch.expm1(d) - d).clamp(-10, 10)
        loss = torch.where(counted, extra["weight"] * loss, 0.0).sum()
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], config.optimizer.clip_norm)
    optimizer.step()
    return {"loss": total, "grad_norm": float(norm)}


def _torch_log_probs(model: Qwen2_5_VLForConditionalGeneration, part: Sequence[Segment], banned: torch.Tensor):
    device = model.device
    tokens = torch.tensor(_padded([s.token_ids for s in part]), dtype=torch.long, device=device)
    positions = np.stack([_padded([s.positions[axis] for s in part]) for axis in range(3)])
    images = {
        "pixel_values": torch.tensor(np.concatenate([s.patches for s in part]), device=device),
        "image_grid_thw": torch.tensor(np.concatenate([s.grid_thw for s in part]), dtype=torch.long, device=device),
        "mm_token_type_ids": (tokens == model.config.image_token_id).int(),
    }
    logits = model(
        input_ids=tokens,
        attention_mask=torch.tensor(_padded([np.ones(len(s.token_ids), int) for s in part]), device=device),
        position_ids=torch.tensor(positions, dtype=torch.long, device=device),
        **(images if len(images["pixel_values"]) else {}),
    ).logits
    log_probs = torch.log_softmax(logits.float().masked_fill(banned, -torch.inf)[:, :-1], -1)
    picked = log_probs.gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(part), 1, device=device), picked], dim=1)


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(arrays), max(map(len, arrays))), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
