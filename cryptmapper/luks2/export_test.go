package luks2

// Match checks a primary copy's form alone, without key material and MAC.
func Match(raw []byte, w Want, ours bool) (*Header, error) {
	if ours {
		return w.parse(raw, 0)
	}
	return w.match(raw, 0, w.constellation)
}
