// Runs every check, or those whose names contain the argument.

#include "check.h"

#include <cstdarg>

namespace check {

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

void failed(const char* file, int line, const char* format, ...) {
    fprintf(stderr, "%s:%d: ", file, line);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

template <class T>
static void compare(const char* what, const std::vector<T>& found, const std::vector<double>& expected, double relative, double absolute) {
    EXPECT(found.size() == expected.size(), "%s: %zu values, expected %zu", what, found.size(), expected.size());
    for (size_t i = 0; i < found.size(); i++) {
        double allowed = relative * std::fabs(expected[i]) + absolute;
        EXPECT(std::fabs(double(found[i]) - expected[i]) <= allowed, "%s: value %zu of %zu: found %.9g, expected %.9g within %.2g", what, i,
               found.size(), double(found[i]), expected[i], allowed);
    }
}

void near(const char* what, const std::vector<float>& found, const std::vector<double>& expected, double relative, double absolute) {
    compare(what, found, expected, relative, absolute);
}

void near(const char* what, const std::vector<double>& found, const std::vector<double>& expected, double relative, double absolute) {
    compare(what, found, expected, relative, absolute);
}

}  // namespace check

int main(int count, char** arguments) {
    size_t run = 0;
    for (const auto& test : check::tests()) {
        if (count < 2 || strstr(test.name, arguments[1]) != nullptr) {
            fprintf(stderr, "%s\n", test.name);
            test.run();
            run++;
        }
    }
    printf("%zu checks passed\n", run);
    return run == 0;
}
