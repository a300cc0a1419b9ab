package allocation

import "iter"

// pull runs steps as a coroutine. Each call of next runs it up to its next step, which
// it notes in log, and reports whether there is one; stop ends it.
func pull(steps func(yield func(string)), log *[]string) (next func() bool, stop func()) {
	type stopped struct{}
	step, end := iter.Pull(func(yield func(string) bool) {
		defer func() {
			if r := recover(); r != nil && r != (stopped{}) {
				panic(r)
			}
		}()
		steps(func(name string) {
			if !yield(name) {
				panic(stopped{})
			}
		})
	})
	return func() bool {
		name, more := step()
		if more {
			*log = append(*log, name)
		}
		return more
	}, end
}
