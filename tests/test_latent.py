"""Latents: tensors and masks, the shipped pair, and checkpoints of CompVis against its formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.latent import (
    AUTOENCODER_WEIGHTS,
    LATENT_SCHEDULE,
    UNET_WEIGHTS,
    LatentDiffusion,
    build_autoencoder,
    build_unet,
    default_autocast,
    latent_known,
    load_autoencoder,
    load_latent_diffusion,
    psnr,
    save_weights,
    to_tensor,
    to_uint8,
    unet_from_compvis,
    vq_from_compvis,
)

# --- tensors and masks ----------------------------------------------------------------------------


def test_images_survive_the_way_to_tensors_and_back():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
    x = to_tensor(image)
    assert x.shape == (1, 3, 16, 16) and float(x.min()) == -1 and float(x.max()) == 1
    assert np.array_equal(to_uint8(x)[0], image)
    assert np.array_equal(to_uint8(torch.full((1, 3, 2, 2), 9.0)), np.full((1, 2, 2, 3), 255))


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match="float64"):
        to_tensor(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_a_cell_is_known_only_if_all_its_pixels_are():
    known = np.ones((1, 8, 8), bool)
    known[0, 3, 7] = False
    m = latent_known(known, 4)
    assert m.shape == (1, 1, 2, 2)
    assert m[0, 0].tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ValueError, match="multiples of 4"):
        latent_known(np.ones((6, 8), bool), 4)


def test_psnr_of_a_known_error():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))


# --- model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_autoencoder((8, 16)), build_unet((16, 16, 32), attention_head_dim=8, groups=8)


def test_shapes_and_factors(small):
    model = LatentDiffusion(*small, image_patch=2, latent_patch=2, shift=0.5, scale=2.0)
    assert (model.factor, model.multiple, model.channels) == (4, 32, 4)
    x = torch.rand(2, 3, 64, 32) * 2 - 1
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (2, 4, 16, 8) and model.decode(z).shape == x.shape
        assert model.eps(z, 5).shape == z.shape
        raw = LatentDiffusion(small[0], image_patch=2).encode(x)
    torch.testing.assert_close(z, (raw - 0.5) * 2)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(x[..., :30])


def test_decoding_undoes_shift_and_scale():
    torch.manual_seed(0)
    network = build_autoencoder((8, 16))
    plain = LatentDiffusion(network, image_patch=2)
    model = LatentDiffusion(network, image_patch=2, shift=0.5, scale=2.0)
    x = torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(x)), plain.decode(plain.encode(x)))


def test_v_is_converted_to_noise(small):
    model = LatentDiffusion(*small, image_patch=2, latent_patch=2, prediction="v_prediction")
    z0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for t in (0, 500, 999):
        a = float(model.alphas_cumprod[t])
        z_t = math.sqrt(a) * z0 + math.sqrt(1 - a) * eps
        model.network = lambda z, t, a=a: math.sqrt(a) * eps - math.sqrt(1 - a) * z0
        torch.testing.assert_close(model.eps(z_t, t), eps, rtol=1e-4, atol=1e-4)
    times = torch.tensor([0, 999])
    assert model.eps(z0, times).shape == z0.shape


def test_bad_options_are_named(small):
    with pytest.raises(ValueError, match="prediction 'x0'"):
        LatentDiffusion(*small, prediction="x0")
    with pytest.raises(ValueError, match="beta_schedule"):
        LatentDiffusion(*small, schedule={**LATENT_SCHEDULE, "beta_schedule": "cosine"})
    with pytest.raises(ValueError, match="no unet"):
        LatentDiffusion(small[0], image_patch=2).eps(torch.zeros(1, 4, 8, 8), 0)


@pytest.mark.parametrize("option", ["channels_last", "checkpointing"])
def test_tuned_networks_compute_the_same(option):
    torch.manual_seed(0)
    model = LatentDiffusion(
        build_autoencoder((8, 16)), build_unet((16, 16, 32), attention_head_dim=8, groups=8),
        image_patch=2, latent_patch=2,
    )  # fmt: skip
    z = torch.randn(2, 4, 16, 16)

    def outcome():
        z_t = z.clone().requires_grad_(True)
        e = model.eps(z_t, 300)
        return e.detach(), torch.autograd.grad(e.square().sum(), z_t)[0]

    before = outcome()
    for one, other in zip(before, (model.tune(**{option: True}), outcome())[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no unet"):
        LatentDiffusion(build_autoencoder((8, 16)), image_patch=2).tune(checkpointing=True)


def test_checkpointing_keeps_less_for_the_gradient():
    torch.manual_seed(0)
    model = LatentDiffusion(
        build_autoencoder((8, 16)), build_unet((16, 16, 32), attention_head_dim=8, groups=8),
        image_patch=2, latent_patch=2,
    )  # fmt: skip

    def kept():
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.eps(torch.randn(1, 4, 16, 16).requires_grad_(True), 300)
        return total

    assert kept() > 2 * (model.tune(checkpointing=True), kept())[1]


def test_precision_follows_the_device(monkeypatch):
    assert default_autocast("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert default_autocast("cuda:0") is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert default_autocast("cuda") is None


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_networks_run_in_the_precision_asked_for(small, autocast):
    """Inside; what comes out is in full precision."""
    model, seen = LatentDiffusion(*small, image_patch=2, latent_patch=2, autocast=autocast), []
    first, unet = model.autoencoder, model.unet
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
        for layer in (first.encoder.conv_in, first.decoder.conv_in, unet.conv_in, unet.conv_out)
    ]
    with torch.no_grad():
        z = model.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
        out = z, model.decode(z), model.eps(z, 5)
    for hook in hooks:
        hook.remove()
    assert seen == [autocast or torch.float32] * 4
    assert {x.dtype for x in out} == {torch.float32}


def test_tuning_compiles_the_noise_network(monkeypatch):
    calls = []

    def compiled(call, **_):
        return lambda *args, **options: calls.append(call) or call(*args, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    torch.manual_seed(0)
    unet = build_unet((16, 16, 32), attention_head_dim=8, groups=8)
    model, z = LatentDiffusion(build_autoencoder((8, 16)), unet, image_patch=2, latent_patch=2), []
    for compile in (False, True):
        with torch.no_grad():
            z.append(model.tune(compile=compile).eps(torch.ones(1, 4, 16, 16), 300))
        assert len(calls) == int(compile)
    assert torch.equal(*z)


def test_weights_come_back_from_files(small, tmp_path):
    autoencoder, unet = small
    save_weights(tmp_path / "autoencoder.safetensors", "autoencoder", autoencoder.state_dict(),
                 {"build": {"channels": [8, 16]},
                  "model": {"image_patch": 2, "scale": 3.0}})  # fmt: skip
    save_weights(tmp_path / "unet.safetensors", "unet", unet.state_dict(),
                 {"build": {"channels": [16, 16, 32], "attention_head_dim": 8, "groups": 8},
                  "model": {"latent_patch": 2, "prediction": "v_prediction"}})  # fmt: skip
    model = load_latent_diffusion(tmp_path)
    assert model.scale == 3.0 and model.prediction == "v_prediction" and not model.training
    for key, value in autoencoder.state_dict().items():
        torch.testing.assert_close(model.autoencoder.state_dict()[key], value, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in model.parameters())
    before = (tmp_path / "unet.safetensors").read_bytes()
    save_weights(tmp_path / "unet.safetensors", "unet", unet.state_dict(),
                 {"build": {"channels": [16, 16, 32], "attention_head_dim": 8, "groups": 8},
                  "model": {"latent_patch": 2, "prediction": "v_prediction"}})  # fmt: skip
    assert (tmp_path / "unet.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="no 'autoencoder' weights"):
        load_autoencoder(tmp_path / "unet.safetensors")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.ckpt'"):
        load_latent_diffusion("nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match="train_latent unet"):
        load_latent_diffusion(tmp_path)
    (tmp_path / "autoencoder.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_autoencoder(tmp_path / "autoencoder.safetensors")


@pytest.mark.skipif(not AUTOENCODER_WEIGHTS.exists(), reason="no shipped autoencoder")
def test_shipped_autoencoder_reconstructs_tissue():
    from helpers.latent_scenes import held_out
    from helpers.train_latent import score_autoencoder

    score = score_autoencoder(load_autoencoder(), held_out(4))
    assert score["psnr"] > 28 and score["ssim"] > 0.85


@pytest.mark.skipif(not UNET_WEIGHTS.exists(), reason="no shipped unet")
def test_shipped_pair_denoises_tissue():
    from helpers.diffusion import tweedie
    from helpers.latent_scenes import held_out

    model = load_latent_diffusion()
    assert UNET_WEIGHTS.stat().st_size < 15e6 and AUTOENCODER_WEIGHTS.stat().st_size < 15e6
    with torch.no_grad():
        z0 = model.encode(to_tensor(held_out(2)))
        assert 0.5 < float(z0.std()) < 2
        noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
        for t, most in ((100, 0.75), (300, 0.6)):
            a = float(model.alphas_cumprod[t])
            z_t = math.sqrt(a) * z0 + math.sqrt(1 - a) * noise
            error = (tweedie(z_t, model.eps(z_t, t), a) - z0).square().mean()
            assert float(error) < most * float(((z_t / math.sqrt(a)) - z0).square().mean())


# --- CompVis: its networks written out from the formulas, with its names --------------------------


def norm(channels, eps):
    return nn.GroupNorm(32, channels, eps=eps)


class Res(nn.Module):
    """Residual block of the UNet of latent diffusion."""

    def __init__(self, a, b, emb):
        super().__init__()
        self.in_layers = nn.Sequential(norm(a, 1e-5), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, b))
        self.out_layers = nn.Sequential(
            norm(b, 1e-5), nn.SiLU(), nn.Dropout(0), nn.Conv2d(b, b, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x, e):
        h = self.in_layers(x) + self.emb_layers(e)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Att(nn.Module):
    """Attention block, heads outermost in the tensor of query, key and value."""

    def __init__(self, c, head):
        super().__init__()
        self.head, self.norm = head, norm(c, 1e-5)
        self.qkv, self.proj_out = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x, e):
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x.flatten(2))).reshape(n * c // self.head, 3 * self.head, h * w)
        q, k, v = qkv.split(self.head, dim=1)
        scale = 1 / math.sqrt(math.sqrt(self.head))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        out = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, h * w)
        return x + self.proj_out(out).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x, e):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, e):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x, e):
        return super().forward(x)


class CompVisUNet(nn.Module):
    """``openaimodel.UNetModel``, unconditional."""

    def __init__(self, width=32, mult=(1, 2, 2), attention=(False, True, True), depth=2, head=32):
        super().__init__()
        self.width, emb = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(3, width, 3, padding=1)])])
        c, skips = width, [width]
        for level, m in enumerate(mult):
            for _ in range(depth):
                block = [Res(c, m * width, emb)]
                c = m * width
                block += [Att(c, head)] if attention[level] else []
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Down(c)]))
                skips.append(c)
        self.middle_block = nn.ModuleList([Res(c, c, emb), Att(c, head), Res(c, c, emb)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mult))):
            for j in range(depth + 1):
                block = [Res(c + skips.pop(), mult[level] * width, emb)]
                c = mult[level] * width
                block += [Att(c, head)] if attention[level] else []
                block += [Up(c)] if level and j == depth else []
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(norm(c, 1e-5), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x, t):
        half = self.width // 2
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        e = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=-1))
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, e)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, e)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, e)
        return self.out(x)


class VRes(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = norm(a, 1e-6), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = norm(b, 1e-6), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAtt(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(x.shape))


def mid(c):
    return nn.ModuleDict({"block_1": VRes(c, c), "attn_1": VAtt(c), "block_2": VRes(c, c)})


def run_mid(m, x):
    return m["block_2"](m["attn_1"](m["block_1"](x)))


class VEncoder(nn.Module):
    def __init__(self, widths, depth, z):
        super().__init__()
        self.conv_in, c = nn.Conv2d(3, widths[0], 3, padding=1), widths[0]
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(depth):
                level.block.append(VRes(c, width))
                c = width
            if i < len(widths) - 1:
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(c, c, 3, stride=2)
            self.down.append(level)
        self.mid, self.norm_out = mid(c), norm(c, 1e-6)
        self.conv_out = nn.Conv2d(c, z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(run_mid(self.mid, x))))


class VDecoder(nn.Module):
    def __init__(self, widths, depth, z):
        super().__init__()
        c = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z, c, 3, padding=1), mid(c)
        levels = []
        for i in reversed(range(len(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(depth + 1):
                level.block.append(VRes(c, widths[i]))
                c = widths[i]
            if i:
                level.upsample = nn.Module()
                level.upsample.conv = nn.Conv2d(c, c, 3, padding=1)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(c, 1e-6), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        x = run_mid(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class CompVisVQ(nn.Module):
    """``VQModelInterface``: encodes before quantisation, quantises when it decodes."""

    def __init__(self, widths=(32, 32, 64), depth=1, z=3, entries=50):
        super().__init__()
        self.encoder, self.decoder = VEncoder(widths, depth, z), VDecoder(widths, depth, z)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(entries, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, z, 1), nn.Conv2d(z, z, 1)

    def encode(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        n, c, h, w = z.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, c)
        book = self.quantize.embedding.weight
        nearest = (flat[:, None] - book[None]).square().sum(-1).argmin(1)
        return self.decoder(self.post_quant_conv(book[nearest].reshape(n, h, w, c).movedim(-1, 1)))


@pytest.fixture(scope="module")
def compvis():
    torch.manual_seed(1)
    unet, vq = CompVisUNet(), CompVisVQ()
    with torch.no_grad():
        for p in [*unet.parameters(), *vq.parameters()]:
            p.add_(0.05 * torch.randn_like(p))  # norms and biases at random too
    return unet.eval(), vq.eval()


def checkpoint(unet, vq, *, ema=False):
    state = {f"model.diffusion_model.{k}": v for k, v in unet.state_dict().items()}
    if ema:
        state = {k: torch.zeros_like(v) for k, v in state.items()}
        state |= {f"model_ema.{('diffusion_model.' + k).replace('.', '')}": v
                  for k, v in unet.state_dict().items()}  # fmt: skip
        state |= {"model_ema.decay": torch.tensor(0.9999)}
    state |= {f"first_stage_model.{k}": v for k, v in vq.state_dict().items()}
    state |= {"first_stage_model.loss.discriminator.weight": torch.zeros(3), "betas": torch.ones(9)}
    return {"state_dict": state, "global_step": 7}


@pytest.mark.parametrize("ema", [False, True])
def test_compvis_checkpoint_computes_the_same(compvis, tmp_path, ema):
    unet, vq = compvis
    torch.save(checkpoint(unet, vq, ema=ema), tmp_path / "model.ckpt")
    model = load_latent_diffusion(tmp_path / "model.ckpt")
    assert (model.factor, model.channels, model.scale, model.prediction) == (4, 3, 1.0, "epsilon")
    with torch.no_grad():
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        z = vq.encode(x)
        torch.testing.assert_close(model.encode(x), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(z), vq.decode(z), rtol=1e-4, atol=1e-4)
        t = torch.tensor([3, 700])
        torch.testing.assert_close(model.eps(z, t), unet(z, t), rtol=1e-4, atol=1e-4)


def test_compvis_checkpoint_inpaints(compvis, tmp_path):
    from helpers.diffusion import inpaint

    torch.save(checkpoint(*compvis), tmp_path / "model.ckpt")
    model = load_latent_diffusion(tmp_path / "model.ckpt")
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    unknown = np.zeros((1, 32, 32), bool)
    unknown[0, 8:20, 8:20] = True
    out = inpaint(model, image, unknown, steps=2)
    assert np.array_equal(out[~unknown], image[~unknown]) and (out != image).any()


def test_every_compvis_tensor_is_used_once(compvis):
    unet, vq = compvis
    for network, convert in ((unet, unet_from_compvis), (vq, vq_from_compvis)):
        state = network.state_dict()
        total = sum(v.numel() for v in state.values())
        assert sum(p.numel() for p in convert(state).parameters()) == total
        key = sorted(state)[len(state) // 2]
        with pytest.raises(ValueError, match=r"lacks|fit nowhere|does not fill"):
            convert({k: v for k, v in state.items() if k != key})
        with pytest.raises(ValueError, match="fit nowhere"):
            convert({**state, "surplus.weight": torch.zeros(1)})


def test_networks_of_lsun_beds_are_taken_at_their_real_size():
    """Shapes alone, which need no memory."""
    with torch.device("meta"):
        unet = unet_from_compvis(
            CompVisUNet(224, (1, 2, 3, 4), (False, True, True, True)).state_dict()
        )
        vq = vq_from_compvis(CompVisVQ((128, 256, 512), 2, 3, 8192).state_dict())
        model = LatentDiffusion(vq, unet)
    counts = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (unet, vq)]
    assert counts == pytest.approx([274.06, 55.32], abs=0.005)
    assert unet.config.down_block_types == ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (model.channels, model.factor, model.multiple) == (3, 4, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "no state dictionary"),
        ({"state_dict": {"conv.weight": torch.zeros(3)}}, "has no 'first_stage_model'.*conv"),
        ({"first_stage_model.a": torch.zeros(1),
          "model.diffusion_model.b.attn2.to_k.weight": torch.zeros(1)}, "attn2"),
        ({"first_stage_model.quant_conv.weight": torch.zeros(1),
          "model.diffusion_model.x": torch.zeros(1)}, "no VQ first stage"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message):
        load_latent_diffusion(tmp_path / "other.ckpt")


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_checkpoint_never_runs(tmp_path, capsys):
    torch.save({"state_dict": Surprise()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="plain weights"):
        load_latent_diffusion(tmp_path / "evil.ckpt")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="plain weights"):
        load_latent_diffusion(tmp_path / "text.ckpt")
