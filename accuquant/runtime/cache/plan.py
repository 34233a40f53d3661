"""What was decided about a cache: where its full steps are, and how it forecasts what of the others.

A person asks for a `recipe.Cache`, which may leave things open; a search closes them, and what comes out is a plan.
Tensors and numbers that calibration finds for one are a `Fitted`. An export's config.json holds both, as one section.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pydantic import ValidationError

from accuquant.core.forecasts import FORECASTS, Differences, Forecast, Norm, Settings
from accuquant.errors import CacheError
from accuquant.recipe import Cache


@dataclass(frozen=True)
class ModuleForecast:
    """How one module is forecast, where that differs from the rest of its plan."""

    estimation: str
    order: int
    differences: Differences = "taylor"
    norm: Norm = "sample"
    noise_aware: bool = False

    def made(self, noise: tuple[float, float] | None) -> Forecast:
        """The forecast itself; ``noise`` is the module's own, for one that is to know it.

        Raises:
            CacheError: there is no such forecast.
        """
        settings = Settings(self.order, self.differences, self.norm, noise if self.noise_aware else None)
        try:
            return FORECASTS[self.estimation].of(settings)
        except ValueError as error:
            raise CacheError(f"estimation: {self.estimation}: {error}") from error


@dataclass(frozen=True)
class CachePlan:
    """A cache that leaves nothing open. Its settings are named and documented as those of `recipe.Cache`.

    Attributes:
        full_steps, full_timesteps, interval, tau: one of them says which steps are full; the others are None.
        order: of the forecast.
        forecasts: of modules, by name, whose forecast is another; empty where all are alike.
        learned: forecasts are weighted by learned shares.
        measured_nfc: full computations of a trajectory, mean and standard deviation over the samples of a search.
    """

    estimation: str
    order: int
    full_steps: tuple[int, ...] | None = None
    full_timesteps: tuple[float, ...] | None = None
    interval: int | None = None
    tau: float | None = None
    warmup: int = 2
    offset: int | None = None
    max_gap: int | None = None
    num_inference_steps: int | None = None
    differences: Differences = "taylor"
    norm: Norm = "sample"
    noise_aware: bool = False
    feature: str = "modules"
    blocks: tuple[int, int] | None = None
    modules: str | None = None
    factors_dtype: str | None = None
    factors_device: str | None = None
    corrected: bool = False
    corrected_quantization: bool = False
    correction_ridge: float | None = None
    measured_on: str = "quantized"
    learned: bool = False
    measured_nfc: tuple[float, ...] | None = None
    forecasts: dict[str, ModuleForecast] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        wish: Cache,
        *,
        full_steps: tuple[int, ...] | None = None,
        full_timesteps: tuple[float, ...] | None = None,
        tau: float | None = None,
        measured_nfc: tuple[float, ...] | None = None,
    ) -> CachePlan:
        """What is asked for, with what a search found, or tries, in the place of the target.

        Raises:
            CacheError: something is left open that has to be searched for first.
        """
        found: dict[str, Any] = {"full_steps": full_steps, "full_timesteps": full_timesteps, "tau": tau}
        if not any(found.values()):
            if wish.searches:
                raise CacheError(
                    "target_nfc, target_seconds, dps and auto need a search: give enable_cache the whole pipeline"
                )
            names = ("full_steps", "full_timesteps", "tau", "interval")
            name = next(name for name in names if getattr(wish, name) is not None)
            found = {name: getattr(wish, name)}
        found |= {"order": wish.forecast_order, "measured_nfc": measured_nfc}
        other = {"interval", "full_timesteps", "tau"} | (set() if found.get("tau") else {"max_gap"})
        other |= {"warmup"} if found.get("full_steps") else set()
        other |= {"offset"} if found.get("full_steps") or found.get("full_timesteps") else set()
        taken = {f.name for f in fields(cls)} & {*Cache.model_fields} - {*found} - other
        return cls(**{name: getattr(wish, name) for name in taken}, **found)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> CachePlan:
        """The plan in the section ``cache`` of an export's quantization_config, of which it takes what is its own.

        Raises:
            ValueError: a key is unknown, or its value none that could be stored there.
        """
        given = {key: value for key, value in stored.items() if value is not None}
        own = given.pop("forecasts", {})
        try:
            own = {module: _checked(module, settings) for module, settings in own.items()}
            plan = cls.of(Cache(**given))
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc']))} {e['msg'].removeprefix('Value error, ')}".strip()
                for e in error.errors()
            ]
            raise ValueError("; ".join(lines)) from error
        except CacheError as error:
            raise ValueError(str(error)) from error
        measured = given.get("measured_nfc")
        learned = bool(given.get("learned_timesteps"))
        nfc = None if measured is None else tuple(measured)
        return replace(plan, learned=learned, measured_nfc=nfc, forecasts=own)

    def to_dict(self) -> dict[str, Any]:
        """Its part of that section: settings that say something, in types that JSON has."""
        silent = {"learned", "full_steps", "forecasts"}  # told by `Fitted`, by another name, and where there are any
        silent |= {"warmup"} if self.full_steps else set()
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in silent}
        named["schedule"] = self.full_steps
        named["forecasts"] = {module: asdict(one) for module, one in self.forecasts.items()} or None
        return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items() if v is not None}

    def as_recipe(self) -> Cache:
        """A recipe's section that asks for this very plan; what is fitted to it is to be found anew.

        Raises:
            CacheError: modules have forecasts of their own, which no recipe can say.
        """
        if self.forecasts:
            raise CacheError(f"{next(iter(self.forecasts))} has a forecast of its own, which no recipe can say")
        return Cache(**self.to_dict())

    def check_steps(self, steps: int | None) -> None:
        """Whether trajectories of this many steps have the full steps that the plan says.

        Raises:
            ValueError: they have not.
        """
        replace(self, order=self.highest_order, estimation="taylor", forecasts={}).as_recipe().check_steps(steps)

    @property
    def fits(self) -> bool:
        """Whether calibration fits a correction to it."""
        return self.corrected or self.corrected_quantization

    @property
    def uses_noise(self) -> bool:
        return self.noise_aware or any(one.noise_aware for one in self.forecasts.values())

    @property
    def uses_fitted(self) -> bool:
        """Whether it asks for anything that calibration has found, a `Fitted`."""
        return self.fits or self.learned or self.uses_noise

    @property
    def uncorrected(self) -> CachePlan:
        return replace(self, corrected=False, corrected_quantization=False, correction_ridge=None)

    @property
    def unfitted(self) -> CachePlan:
        """The same steps and forecast without what was fitted to, learned or measured of a quantized model."""
        own = {module: replace(one, noise_aware=False) for module, one in self.forecasts.items()}
        return replace(self.uncorrected, learned=False, noise_aware=False, forecasts=own)

    @property
    def highest_order(self) -> int:
        """So many full steps and one more, until every forecast has its order."""
        return max([self.order, *(one.order for one in self.forecasts.values())])

    def knows_noise(self, module: str) -> bool:
        """Whether the module's forecast has to be told its noise."""
        return self.forecasts[module].noise_aware if module in self.forecasts else self.noise_aware

    def forecast(self, module: str, noise: tuple[float, float] | None = None) -> Forecast:
        """Of a module, whose own ``noise`` is for one that is to know it.

        Raises:
            CacheError: there is no such forecast.
        """
        usual = ModuleForecast(self.estimation, self.order, self.differences, self.norm, self.noise_aware)
        return self.forecasts.get(module, usual).made(noise)


def _checked(module: str, settings: dict[str, Any]) -> ModuleForecast:
    """A module's own forecast, by the rules of a recipe.

    Raises:
        ValidationError, ValueError: there can be no such forecast.
    """
    if unknown := set(settings) - {f.name for f in fields(ModuleForecast)}:
        raise ValueError(f"forecasts.{module} has unknown keys: {', '.join(sorted(unknown))}")
    one = CachePlan.of(Cache(interval=1, **settings))
    return ModuleForecast(one.estimation, one.order, one.differences, one.norm, one.noise_aware)
