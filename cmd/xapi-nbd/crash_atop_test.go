package main

import "syscall"

// atOp stops the process right after an operation, calls act, and lets the process go on.
func (w *crashWorld) atOp(p *process, op point, act func()) {
	w.t.Helper()
	tr := w.mustAttach(p, op, "STOP")
	w.inBackground(tr, func() {
		for n := 1; ; n++ {
			if _, ok := tr.waitStop(); !ok {
				return
			}
			if n == op.n {
				tr.detach()
				act()
			}
			goOn(p)
		}
	})
}

// killBeforeOp has the kernel kill the process instead of executing an operation. strace
// counts operations by thread, and Go changes threads, so that only the very first operation
// can be selected. Another tracer runs until the operation before it.
func (w *crashWorld) killBeforeOp(p *process, op point) {
	w.t.Helper()
	if op.n == 1 {
		w.inBackground(w.mustAttach(p, op, "KILL"), func() {})
		return
	}
	last := op
	last.n--
	w.atOp(p, last, func() {
		if tr, err := w.attach(p, op.what+":signal=KILL", op.file); err != nil {
			w.t.Error(err)
		} else {
			go tr.drain() // until the process has ended
		}
	})
}

func (w *crashWorld) mustAttach(p *process, op point, signal string) *tracer {
	w.t.Helper()
	tr, err := w.attach(p, op.what+":signal="+signal, op.file)
	if err != nil {
		w.t.Fatal(err)
	}
	return tr
}

// inBackground runs f and then waits for the end of the tracer, which the end
// of the test enforces.
func (w *crashWorld) inBackground(tr *tracer, f func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f()
		tr.drain()
	}()
	w.t.Cleanup(func() {
		_ = tr.cmd.Process.Kill()
		<-ended
	})
}

// goOn lets a stopped process go on, unless it has ended.
func goOn(p *process) { _ = p.cmd.Process.Signal(syscall.SIGCONT) }
