// The last minutes of /ui/stats: rates between polls, distributions over a span, quantiles.

const LENGTHS = [31, 61, 121]; // polls a chart may span: half a minute to two

/** Samples of the server's counters, oldest first. */
export class History {
  constructor() {
    this.samples = []; // {at: seconds of this browser's clock, stats}
  }

  /** Adds the answer of one poll; a server that has started anew starts the history anew. */
  push(at, stats) {
    const last = this.samples.at(-1);
    if (last && stats.uptime_seconds < last.stats.uptime_seconds) this.samples = [];
    this.samples.push({ at, stats });
    if (this.samples.length > LENGTHS.at(-1)) this.samples.shift();
  }

  /** The newest answer. */
  get latest() {
    return this.samples.at(-1).stats;
  }

  /** One value per poll, null where there is none yet, padded in front to the chart's length. */
  series(valueOf) {
    const values = this.samples.map((sample, index) => valueOf(sample, this.samples[index - 1]));
    const length = LENGTHS.find((most) => values.length <= most);
    return [...Array(length - values.length).fill(null), ...values];
  }

  /** Increase per second of a counter since the poll before; null across a pause. */
  rates(counterOf) {
    return this.series((sample, before) => {
      if (before === undefined || sample.at - before.at > 5) return null;
      return (counterOf(sample.stats) - counterOf(before.stats)) / (sample.at - before.at);
    });
  }

  /** A distribution over the last `span` seconds, or since the server started when it is null. */
  distribution(name, span) {
    const now = this.samples.at(-1);
    const { bounds, counts } = now.stats[name];
    if (span === null) return { bounds, counts };
    const from = this.samples.find((sample) => sample.at >= now.at - span);
    const before = from.stats[name].counts;
    return { bounds, counts: counts.map((count, index) => count - before[index]) };
  }
}

/** The number of observations in a distribution. */
export function total({ counts }) {
  return counts.reduce((sum, count) => sum + count, 0);
}

/**
 * The q-quantile, straight lines assumed within a bucket, and the bucket it falls in.
 * A value beyond the last bound is not known: `seconds` is then Infinity. Null without data.
 */
export function quantile({ bounds, counts }, q) {
  let rest = total({ counts }) * q;
  if (rest === 0) return null;
  for (const [bucket, count] of counts.entries()) {
    if (count > 0 && rest <= count) {
      const part = rest / count;
      const low = bucket === 0 ? 0 : bounds[bucket - 1];
      const seconds = bucket < bounds.length ? low + (bounds[bucket] - low) * part : Infinity;
      return { seconds, bucket, part };
    }
    rest -= count;
  }
  return null;
}
