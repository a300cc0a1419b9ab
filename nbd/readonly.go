package nbd

// ReadOnly returns a Device that a server serves read-only: it hides that d is a
// [Writer], and keeps everything that concerns reading, such as [Extenter] and
// [FileBacked]. Closing it closes d. d must not be closed otherwise.
func ReadOnly(d Device) Device {
	if _, ok := d.(readOnly); ok {
		return d
	}
	return readOnly{d}
}

type readOnly struct{ Device }

// unwrap returns the device in which the interfaces that a Device may implement are
// looked for: the one below ReadOnly, because a wrapper cannot have just the methods
// that d has.
func unwrap(d Device) Device {
	if r, ok := d.(readOnly); ok {
		return unwrap(r.Device)
	}
	return d
}
