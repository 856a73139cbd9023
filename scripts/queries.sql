-- Questions to a cache, in plain SQL; 2, 3 and 4 give the numbers of `potstill inspect`. DuckDB 2.0 or later; 1.4 or later for a cache written with plain ids (--compat).
--
--   duckdb -cmd "set variable shards = 'CACHE/shard-*.parquet'" < scripts/queries.sql
--
-- For every token a list column has one entry. Entry i (0-based) is the teacher's distribution after token i and predicts token
-- i + 1; where nothing is scored it is empty. SQL counts from 1: entry i is topk_ids[i + 1], and what came is input_ids[i + 2].
-- For a cache with logits (preset exact) read topk_logits[n][j] - logsumexp[n] in place of topk_logprobs[n][j]; for a sampled one
-- sample_ids[n] with sample_counts[n] / draws in place of probabilities.

-- 1. What the teacher expected at one place, and what came: the first scored position of the first conversation.
with conversation as (
    select *, list_position([len(ids) > 0 for ids in topk_ids], true) as n
    from read_parquet(getvariable('shards'))
    order by seq_id
    limit 1
)
select
    seq_id,
    n - 1 as after_token,
    input_ids[n] as token,
    input_ids[n + 1] as came,
    unnest(topk_ids[n][1:5]) as expected,
    round(exp(unnest(topk_logprobs[n][1:5])), 4) as probability
from conversation;

-- 2. The figures of the whole cache, as `potstill inspect` gives them. Where the data's token was not kept, its probability is at most
-- the least kept one's and the tail's: the perplexity is at least this.
with position as (
    select
        unnest(list_append(input_ids[2:], null)) as came,
        unnest(topk_ids) as ids,
        unnest(topk_logprobs) as logprobs,
        unnest(tail_logprob) as tail
    from read_parquet(getvariable('shards'))
)
select
    count(*) as scored,
    avg(exp(logprobs[1])) as mean_top1,
    avg(list_sum([exp(l) for l in logprobs])) as mean_kept_mass,
    avg(exp(tail)) as mean_tail_mass,
    avg(-list_sum([exp(l) * l for l in logprobs]) - exp(tail) * tail) as mean_entropy,
    avg((ids[1] = came)::int) as top1_is_next,
    avg(list_contains(ids, came)::int) as next_is_kept,
    exp(-avg(coalesce(logprobs[list_position(ids, came)], least(logprobs[-1], tail)))) as perplexity_at_least
from position
where len(ids) > 0;

-- 3. The conversations that surprised the teacher most, as `potstill inspect` lists them.
with position as (
    select
        seq_id,
        unnest(list_append(input_ids[2:], null)) as came,
        unnest(topk_ids) as ids,
        unnest(topk_logprobs) as logprobs,
        unnest(tail_logprob) as tail
    from read_parquet(getvariable('shards'))
)
select
    seq_id,
    count(*) as scored,
    exp(-avg(coalesce(logprobs[list_position(ids, came)], least(logprobs[-1], tail)))) as perplexity_at_least,
    avg((ids[1] = came)::int) as top1_is_next
from position
where len(ids) > 0
group by seq_id
having count(*) >= 16
order by perplexity_at_least desc, seq_id
limit 10;

-- 4. Calibration, as `potstill inspect` gives it: how often the teacher's first choice came, by the probability it gave to it.
with position as (
    select
        unnest(list_append(input_ids[2:], null)) as came,
        unnest(topk_ids) as ids,
        unnest(topk_logprobs) as logprobs
    from read_parquet(getvariable('shards'))
)
select
    least(floor(10 * exp(logprobs[1])), 9) / 10 as from_probability,
    count(*) as positions,
    avg(exp(logprobs[1])) as mean_top1,
    avg((ids[1] = came)::int) as top1_is_next
from position
where len(ids) > 0
group by from_probability
order by from_probability;

-- 5. Tokens the teacher expected far more often than they came.
with position as (
    select unnest(list_append(input_ids[2:], null)) as came, unnest(topk_ids) as ids, unnest(topk_logprobs) as logprobs
    from read_parquet(getvariable('shards'))
),
expected as (
    select id, sum(exp(logprob)) as expected
    from (select unnest(ids) as id, unnest(logprobs) as logprob from position)
    group by id
),
came as (
    select came as id, count(*) as came
    from position
    where len(ids) > 0
    group by came
)
select id, round(expected, 2) as expected, coalesce(came, 0) as came
from expected left join came using (id)
order by expected.expected - coalesce(came.came, 0) desc, id
limit 10;
