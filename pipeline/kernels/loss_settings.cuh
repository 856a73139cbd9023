// What the host tells loss_rows beside the rows: pipeline/src/loss/settings.rs as plain numbers. Mirrored by pipeline/src/cuda/loss.rs.
#pragma once

namespace loss {

enum Divergence { FORWARD_KL, REVERSE_KL, JSD, SKEWED_KL, SKEWED_REVERSE_KL, TOTAL_VARIATION };
enum Tail { BUCKET, RENORM, STUDENT_FULL, EXACT_TAIL, NONE };
enum Status { FINE, NO_MASS, REPEATED_ID };

// `parameter` is beta or skew. A row's status other than FINE makes the rest of its results meaningless.
struct Settings {
    double temperature, kd_alpha, kd_ce_alpha, scale, parameter;
    int divergence, tail;
};

}  // namespace loss
