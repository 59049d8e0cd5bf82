package keyservice

import "github.com/cryptcsi/cryptcsi/dek"

// Sharing says how many callers wait for the read of a DEK after the one that
// is under way.
func (s *Server) Sharing(id dek.ID) int {
	s.flights.mu.Lock()
	defer s.flights.mu.Unlock()
	if next := s.flights.waiting[id]; next != nil {
		return next.riders
	}
	return 0
}

// Idle says whether no read of a DEK is under way.
func (s *Server) Idle(id dek.ID) bool {
	s.flights.mu.Lock()
	defer s.flights.mu.Unlock()
	_, flying := s.flights.waiting[id]
	return !flying
}
