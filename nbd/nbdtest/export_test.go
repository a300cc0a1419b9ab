package nbdtest

// SlowMem is a Mem whose reads wait inside: each delivers to arrived and goes
// on when release is closed.
func SlowMem(size int64) (m *Mem, arrived, release chan struct{}) {
	arrived, release = make(chan struct{}), make(chan struct{})
	return &Mem{size: size, fill: func([]byte, int64) {
		arrived <- struct{}{}
		<-release
	}}, arrived, release
}
